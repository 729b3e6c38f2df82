"""Samples: from files, folders of images and functions; the inputs to compile with."""
