"""Weights in the format safetensors, which holds tensors by name and no code."""

from pathlib import Path
from typing import Any

from pn_compiler.base.errors import LoadError, first_line

_LONGEST_HEADER = 2**27  # bytes


def is_safetensors(start: bytes) -> bool:
    """Whether a file that begins like this is one: the length of its header, and that, which is JSON."""
    return len(start) > 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32


def read_safetensors(path: Path) -> dict[str, Any]:
    """Name -> tensor.

    Raises:
        LoadError: the file is damaged, or safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise LoadError(f"reading {path} needs safetensors: pip install safetensors") from error
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length <= _LONGEST_HEADER:
            with safe_open(path, framework="pt") as tensors:  # maps the file into memory
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  # not a dict
    except Exception as error:  # a SafetensorError, or anything else that a damaged header raises
        raise LoadError(f"cannot load {path}: safetensors fails on it ({first_line(error)[:200]})") from error
    raise LoadError(f"{path} is damaged: its header would have {length} bytes")
