"""Arrays from files, by name, without running code that the file brings and read from disk when used."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pn_compiler.errors import ConfigError


def read_arrays(path: Path) -> dict[str, NDArray[Any] | Tensor]:
    """Name -> array of a file ``.npy``, ``.npz`` or ``.safetensors``; a single one has the name "".

    All but ``.npz`` are read from disk where values are used.

    Raises:
        ConfigError: the file is missing, damaged, of another kind, or holds Python objects.
    """
    kind = path.suffix.lower()
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
            return dict(np.load(file, allow_pickle=False))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        why = "it is damaged, or holds Python objects and not plain arrays"
        raise ConfigError(f"cannot read {path}: {why} ({error})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ConfigError(f"reading {path} needs safetensors: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:  # maps the file into memory
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except SafetensorError as error:
        raise ConfigError(f"cannot read {path}: it is damaged, or another format ({error})") from error
