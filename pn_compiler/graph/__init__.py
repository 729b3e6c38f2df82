"""torch.fx graphs: lookups and edits, shared memory, ranks, the table of sites, the contract of a pass."""
