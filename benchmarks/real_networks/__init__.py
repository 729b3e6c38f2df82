"""Public trained networks on real data, after each way to replace BatchNorm: `python -m` says which."""
