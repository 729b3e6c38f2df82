"""Named arrays from files, read from disk as they are used; no code in a file is run."""

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pn_compiler.base.errors import ConfigError, first_line
from pn_compiler.base.regular_files import why_unreadable
from pn_compiler.running.memory import total_memory


def read_arrays(path: Path) -> dict[str, NDArray[Any] | Tensor]:
    """Name -> array of a ``.npy``, ``.npz`` or ``.safetensors`` file; a single array has the name "".

    Except for ``.npz``, values are read from disk as they are used.

    Raises:
        ConfigError: the file is missing, damaged, of another kind, or holds Python objects.
    """
    kind = path.suffix.lower()
    if reason := why_unreadable(path):
        raise ConfigError(f"cannot read {path}: {reason}")
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    if kind not in (".npy", ".npz", ".safetensors"):
        raise ConfigError(
            f"cannot read {path}: expected a file .npy, .npz or .safetensors, a folder of images, or "
            "package.module:function"
        )
    arrays: dict[str, NDArray[Any] | Tensor] = {}
    arrays |= _read_safetensors(path) if kind == ".safetensors" else _read_numpy(path, packed=start == b"PK")
    return {"": arrays.popitem()[1]} if len(arrays) == 1 else arrays


def _read_numpy(path: Path, *, packed: bool) -> dict[str, NDArray[Any]]:
    try:
        if not packed:
            return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
        with path.open("rb") as file:  # numpy would leave a damaged archive open
            _refuse_bombs(path, file)
            return dict(np.load(file, allow_pickle=False))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged header or archive can raise anything in numpy and zipfile
        why = "it is damaged, or holds Python objects and not plain arrays"
        raise ConfigError(f"cannot read {path}: {why} ({first_line(error)[:200]})") from error


def _refuse_bombs(path: Path, file: BinaryIO) -> None:
    """Raises ConfigError if the arrays are larger than memory: they are read into it at once."""
    with zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    file.seek(0)
    if size > total_memory():
        raise ConfigError(
            f"cannot read {path}: it unpacks to {size / 2**30:.0f} GB, more than there is memory"
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ConfigError(f"reading {path} needs safetensors: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:  # maps the file into memory
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except Exception as error:  # a SafetensorError, or anything else that a damaged header raises
        why = "it is damaged, or another format"
        raise ConfigError(f"cannot read {path}: {why} ({first_line(error)[:200]})") from error
