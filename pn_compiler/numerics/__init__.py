"""The mathematics of proxy normalization: moments under a Gaussian, statistics of a site, affine maps."""
