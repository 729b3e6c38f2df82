"""Turns every spelling of a layer or activation into a plain module next to its BatchNorm."""
