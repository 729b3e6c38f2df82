"""Graphs of torch.fx: lookups and edits, shared memory, ranks, the table of sites, the contract of a pass."""
