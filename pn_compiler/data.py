"""Samples from a data file, in batches, as a model takes them."""

import dataclasses
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pn_compiler.errors import ConfigError
from pn_compiler.inputs import Inputs

BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Batches:
    """The samples of a file, cut into batches; each iteration starts again at the first.

    Attributes:
        path: the file.
        arrays: argument of the forward -> [N, *]. The name "" stands for the first argument.
        dtype: of the tensors that are made of floating-point arrays.
        batch_size: of all batches but the last, which may be smaller.
        whole: leave out a last batch that is smaller.
    """

    path: Path
    arrays: Mapping[str, NDArray[Any]]
    dtype: torch.dtype
    batch_size: int
    whole: bool = False

    @property
    def samples(self) -> int:
        return min(len(array) for array in self.arrays.values())

    def __len__(self) -> int:
        return self.samples // self.batch_size if self.whole else -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Inputs]:
        """Raises ConfigError where a value is nan or infinite."""
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            values = {name: self._tensor(name, start) for name in self.arrays}
            yield Inputs((values[""],)) if "" in values else Inputs((), values)

    def _tensor(self, name: str, start: int) -> Tensor:
        rows = np.asarray(self.arrays[name][start : start + self.batch_size])
        if rows.dtype.kind != "f":
            return torch.from_numpy(rows.astype(rows.dtype.newbyteorder("=")))  # a copy: files are read-only
        finite = np.isfinite(rows).reshape(len(rows), -1).all(1)
        if not finite.all():
            row = start + int(finite.argmin())
            raise ConfigError(f"{self.path}: sample {row}{_of(name)} holds nan or infinite values")
        return torch.from_numpy(rows.astype(np.float64)).to(self.dtype)


def load_batches(
    path: Path, model: nn.Module, *, batch_size: int = BATCH_SIZE, whole: bool = False
) -> Batches:
    """The samples in `path` as inputs of `model`.

    Args:
        path: ``.npy``, which is not read into memory at once, or ``.npz``, with one array for the first
            argument of the forward or several under the names of its arguments. The first axis of each is
            that of the samples. Values must be preprocessed as for training. No code in it is run.
        model: floating-point arrays take the dtype of its parameters.
        batch_size: samples in a batch.
        whole: leave out a last batch that is smaller, for a model whose batch size is fixed.

    Raises:
        ConfigError: the file cannot be read, or its arrays do not fit each other or the forward.
    """
    arrays = _read(path)
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" or array.ndim < 1:
            raise ConfigError(
                f"{path}{_of(name)} holds {array.dtype} values of shape {array.shape}: expected numbers "
                "whose first axis is that of the samples"
            )
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"{path} holds arrays of different lengths: {lengths}")
    samples, least = min(lengths.values()), batch_size if whole else 2
    if samples < least:
        raise ConfigError(f"{path} holds too few samples: {samples}, and at least {least} are needed")
    if "" not in arrays:
        try:
            Inputs((), arrays).by_name(model)
        except TypeError as error:
            raise ConfigError(
                f"{path} holds the arrays {', '.join(arrays)}, which are not the arguments of the forward of "
                f"{type(model).__name__}: {error}"
            ) from error
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return Batches(path, arrays, next(floating, torch.float32), batch_size, whole)


def _of(name: str) -> str:
    return f" of {name}" if name else ""


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """Name -> array; a single one has the name ""."""
    if path.suffix.lower() not in (".npy", ".npz"):
        raise ConfigError(f"cannot read {path}: expected a file .npy or .npz, as numpy.save and savez write")
    try:
        with path.open("rb") as file:  # numpy would leave a damaged archive open
            if file.read(2) != b"PK":
                return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
            file.seek(0)
            arrays = dict(np.load(file, allow_pickle=False))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        why = "it is damaged, or holds Python objects and not plain arrays"
        raise ConfigError(f"cannot read {path}: {why} ({error})") from error
    if not arrays:
        raise ConfigError(f"{path} holds no array")
    return {"": next(iter(arrays.values()))} if len(arrays) == 1 else arrays
