"""The versions that files, reports and ``--version`` name."""

import importlib.metadata

PACKAGES = ("pn-compiler", "torch", "onnx", "onnxruntime", "onnxscript")


def versions() -> dict[str, str]:
    """The installed version of each of the packages involved, which are not imported."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
