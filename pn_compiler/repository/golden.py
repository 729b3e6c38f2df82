"""Inputs with the outputs that they must give: the file ``golden.npz`` beside a served model."""

import dataclasses
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from pn_compiler.base.errors import LoadError

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Golden:
    """Calls of a model and what they must return.

    Attributes:
        model: name under which the model is served.
        version: of the model in its repository.
        tolerance: largest difference from an output, relative to the largest magnitude in it.
        calls: name -> array, of the inputs and of the outputs of each call.
    """

    model: str
    version: int
    tolerance: float
    calls: tuple[tuple[Arrays, Arrays], ...]

    def to_bytes(self) -> bytes:
        arrays: dict[str, Any] = {
            f"{kind}/{index}/{name}": value
            for index, call in enumerate(self.calls)
            for kind, values in zip(("input", "output"), call, strict=True)
            for name, value in values.items()
        }
        file = io.BytesIO()
        arrays |= {"model": self.model, "version": self.version, "tolerance": self.tolerance}
        np.savez(file, calls=len(self.calls), **arrays)
        return file.getvalue()

    @classmethod
    def load(cls, path: Path) -> "Golden":
        """Reads `path`, which runs no code.

        Raises:
            LoadError: there is no such file, or it is something else.
        """
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            calls: list[tuple[Arrays, Arrays]] = [({}, {}) for _ in range(int(arrays["calls"]))]
            for key in [key for key in arrays if "/" in key]:
                kind, index, name = key.split("/", 2)
                calls[int(index)][("input", "output").index(kind)][name] = arrays[key]
            numbers = int(arrays["version"]), float(arrays["tolerance"])
            return cls(str(arrays["model"]), *numbers, tuple(calls))
        except OSError as error:
            raise LoadError(f"cannot read {path}: {error.strerror or error}") from error
        except (
            ValueError,
            KeyError,
            TypeError,
            EOFError,
            AttributeError,
            IndexError,
            zipfile.BadZipFile,
        ) as error:
            raise LoadError(f"{path} is not a golden.npz that pn_compiler wrote") from error
