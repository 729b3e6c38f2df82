"""Replaces BatchNorm by normalizers and proxy normalization."""
