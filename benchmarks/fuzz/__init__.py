"""Random networks, what their conversion is compared with, and the smallest network that shows a failure."""
