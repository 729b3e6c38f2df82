"""Every spelling of a layer or activation becomes a plain module next to its BatchNorm."""
