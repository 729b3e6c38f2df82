"""BatchNorm in, normalizers and proxy normalization out."""
