"""Rewrites of an ONNX graph, each in its own file."""
