"""Replaces normalizers by constants, which the layers around them absorb."""
