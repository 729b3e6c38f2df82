"""Samples from files, folders of images and functions, and the inputs to compile with."""
