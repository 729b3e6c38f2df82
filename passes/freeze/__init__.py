"""Constants in the place of normalizers: what is left of them goes into the layers around."""
