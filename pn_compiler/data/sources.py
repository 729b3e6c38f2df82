"""Samples from files, folders of images or functions, in batches that a model accepts."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx, nn

from pn_compiler.base.errors import ConfigError, PnCompilerError, named_line
from pn_compiler.base.option_checks import FUNCTION_NAME
from pn_compiler.data.array_files import read_arrays
from pn_compiler.data.input_shape import guess_shape
from pn_compiler.inspection.fake_tensors import fake_mode
from pn_compiler.loading.admission import named_function
from pn_compiler.regions.regions import trace
from pn_compiler.running.copying import unwrap
from pn_compiler.running.evaluation import inputs_of, labels_of, with_inputs
from pn_compiler.running.inputs import Inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pn_compiler.data.image_folder import ImageFolder, Size

BATCH_SIZE = 32


class Batches(Protocol):
    """Batches of samples, read one by one; each iteration starts over.

    ``len()`` is the number of batches, unless a function yields them.
    """

    def __iter__(self) -> Iterator[Any]:
        """Of Inputs, or of (Inputs, labels).

        Raises ConfigError where a batch cannot be read or holds nan or infinite values.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayBatches:
    """The samples in files, split into batches.

    Attributes:
        path: the file or folder.
        arrays: argument of the forward -> [N, *]. The name "" stands for the first argument.
        dtype: dtype of the tensors made from floating-point arrays.
        batch_size: size of all batches but the last, which may be smaller.
        whole: drop a smaller last batch.
        labels: of each sample, [N], if they were asked for.
    """

    path: Path
    arrays: Mapping[str, "NDArray[Any] | Tensor | ImageFolder"]
    dtype: torch.dtype
    batch_size: int
    whole: bool = False
    labels: Tensor | None = None

    @property
    def samples(self) -> int:
        return min(len(array) for array in self.arrays.values())

    def __len__(self) -> int:
        return self.samples // self.batch_size if self.whole else -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            part = slice(start, start + self.batch_size)
            rows = {name: array[part] for name, array in self.arrays.items()}
            inputs = _inputs(rows, self.dtype, str(self.path), start)
            yield inputs if self.labels is None else (inputs, self.labels[part])


@dataclasses.dataclass(frozen=True, slots=True)
class FunctionBatches:
    """The batches that a function yields. The function is called whenever an iteration starts.

    Attributes:
        name: ``package.module:function``.
        function: takes no argument, and yields batches or returns an iterable of them, such as a DataLoader.
            Of a tuple or list the first element is the input, as in (images, labels), and as many as the
            forward needs, as in (left, right); a mapping holds arguments by name; a tensor or numpy array is
            the one argument.
        model: the model whose forward takes the batches.
        batch_size: size of all batches, if `whole`.
        whole: the model's batch size is fixed; a smaller last batch is dropped.
        labelled: batches are (inputs, labels), and both are yielded.
    """

    name: str
    function: Callable[[], Iterable[Any]]
    model: nn.Module
    batch_size: int
    whole: bool = False
    labelled: bool = False

    def __iter__(self) -> Iterator[Any]:
        samples, short = 0, ""
        for number, given in enumerate(self._produced(), start=1):
            where, batch = f"batch {number} of {self.name}", with_inputs(given, self.model)
            arrays = _named(batch, self.model)
            size = _check(arrays, where, self.model)
            samples += size
            if short or (self.whole and size > self.batch_size):
                raise ConfigError(
                    f"{short or where} does not hold {self.batch_size} samples, the fixed batch size of the "
                    "model: yield batches of that size"
                )
            if self.whole and size < self.batch_size:
                short = where
            else:
                inputs = _inputs(arrays, _dtype(self.model), where)
                yield (inputs, labels_of(batch, where)) if self.labelled else inputs
        _refuse_few(self.name, samples, self.batch_size if self.whole else 2)

    def _produced(self) -> Iterator[Any]:
        """Yields what the function yields. Raises ConfigError if it fails."""
        try:
            yield from _iterable(self.name, self.function())
        except PnCompilerError:
            raise
        except Exception as error:
            raise ConfigError(f"{self.name} failed: {named_line(error)}") from error


def load_batches(
    source: str | Path,
    model: nn.Module,
    *,
    batch_size: int = BATCH_SIZE,
    whole: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: "Size | None" = None,
    crop: "Size | None" = None,
    interpolation: str | None = None,
    labelled: bool = False,
    allow_code: bool = False,
) -> Batches:
    """The samples in `source` as inputs of `model`.

    Args:
        source: one of the following. Arrays must be preprocessed as for training.

            - ``.npy``, ``.npz`` or ``.safetensors``: one array for the first argument of the forward, or
              several under the names of its arguments; the first axis of each indexes the samples.
              ``.npz`` is read into memory at once. No code in a file is run.
            - a folder of images, at any depth: RGB, or gray if the first layer of `model` takes 1 channel.
            - ``package.module:function``, see `FunctionBatches`. A file of that name takes precedence.
        model: floating-point arrays get the dtype of its parameters.
        batch_size: samples per batch; a function chooses its own.
        whole: drop a smaller last batch, for a model whose batch size is fixed.
        mean, std, resize, crop, interpolation: for images, see
            `pn_compiler.data.image_folder.Preprocessing`.
        labelled: whether labels are read, too: of images the class that their folder names, see
            `pn_compiler.data.class_folders`; of a function what it yields as (inputs, labels).
        allow_code: whether a function may be imported and called.

    Raises:
        ConfigError: `source` cannot be read, or its values do not fit each other, the forward or the options.
    """
    path = Path(source)
    images = {"mean": mean, "std": std, "resize": resize, "crop": crop, "interpolation": interpolation}
    images = {name: value for name, value in images.items() if value is not None}
    given = list(images)
    is_function = isinstance(source, str) and bool(FUNCTION_NAME.fullmatch(source)) and not path.exists()
    if given and not path.is_dir() and (is_function or path.exists()):
        raise ConfigError(
            f"{source} is not a folder of images, for which {', '.join(given)} would be: leave out "
            f"{', '.join(f'--{name}' for name in given)}"
        )
    if is_function:
        function = _function(str(source), allow_code)
        return FunctionBatches(str(source), function, model, batch_size, whole, labelled)
    if labelled and not path.is_dir() and path.exists():
        raise ConfigError(
            f"{source} has no labels, which a metric needs: give a folder of images with a folder for each "
            "class, or package.module:function that yields (inputs, labels)"
        )
    arrays = {"": _images(path, model, images)} if path.is_dir() else read_arrays(path)
    samples = _check(arrays, str(path), model)
    _refuse_few(str(path), samples, batch_size if whole else 2)
    batches = ArrayBatches(path, arrays, _dtype(model), batch_size, whole)
    if labelled:
        from pn_compiler.data.class_folders import labels_for

        return dataclasses.replace(batches, labels=labels_for(model, path, next(iter(batches))))
    return batches


def _function(source: str, allow_code: bool) -> Callable[[], Iterable[Any]]:
    """Imports and returns the function that ``package.module:function`` names."""
    if not allow_code:
        raise ConfigError(
            f"{source} is not a file, and a function is only imported and called with --allow-data-code "
            "(allow_code=True)"
        )
    return named_function(source, "a function that yields batches")


def _images(path: Path, model: nn.Module, options: Mapping[str, Any]) -> "ImageFolder":
    try:
        from pn_compiler.data.image_folder import RGB, ImageFolder, Preprocessing
    except ImportError as error:
        raise ConfigError(f"reading the images in {path} needs Pillow: pip install pillow") from error
    return ImageFolder.open(path, Preprocessing(_image_channels(model) or RGB, **options))


def _image_channels(model: nn.Module) -> int | None:
    """The number of channels that `model` takes, from its first layer or a program's example input."""
    graph = getattr(model, "graph", None)
    nodes = graph.nodes if isinstance(graph, fx.Graph) else ()
    stored = [node.meta.get("val") for node in nodes if node.op == "placeholder"]
    shapes = [tuple(value.shape) for value in stored if isinstance(value, Tensor)]
    if not shapes:
        try:
            with fake_mode(model):
                shapes = [guess_shape(model, trace(unwrap(model)).root)[0]]
        except PnCompilerError:
            return None
    return int(shapes[0][1]) if len(shapes[0]) == 4 else None


def _iterable(name: str, batches: Any) -> Iterable[Any]:
    """The batches that the function `name` returned. Raises ConfigError if it is one batch, or none."""
    if isinstance(batches, Tensor | np.ndarray | Mapping) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"{name} returned a {type(batches).__name__}, not batches: yield them, or return a list or a "
            "DataLoader"
        )
    return batches


# Values --------------------------------------------------------------------------------------------


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _named(batch: Any, model: nn.Module) -> Mapping[str, Any]:
    """Argument -> value of a batch for `model`; the name "" stands for the first argument."""
    inputs = inputs_of(batch)
    if len(inputs.args) > 1:
        return inputs.by_name(model)
    return {"": inputs.args[0]} if inputs.args else inputs.kwargs


def _check(arrays: Mapping[str, Any], where: str, model: nn.Module) -> int:
    """The number of samples. Raises ConfigError if arrays do not fit each other or the forward."""
    if not arrays:
        raise ConfigError(f"{where} holds no array")
    for name, array in arrays.items():
        if not hasattr(array, "dtype"):
            raise ConfigError(f"{where}{_of(name)} holds a {type(array).__name__}: expected an array")
        if not _is_number(array.dtype) or len(array.shape) < 1:
            dtype = str(array.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{where}{_of(name)} holds {dtype} values of shape {tuple(array.shape)}: expected numbers "
                "whose first axis is that of the samples"
            )
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"{where} holds arrays of different lengths: {lengths}")
    if "" not in arrays:
        try:
            Inputs((), arrays).by_name(model)
        except TypeError as error:
            raise ConfigError(
                f"{where} holds the arrays {', '.join(arrays)}, which are not the arguments of the forward "
                f"of {type(model).__name__}: {error}"
            ) from error
    return min(lengths.values())


def _is_number(dtype: Any) -> bool:
    return not dtype.is_complex if isinstance(dtype, torch.dtype) else dtype.kind in "fiub"


def _refuse_few(where: str, samples: int, least: int) -> None:
    if samples < least:
        raise ConfigError(f"{where} holds too few samples: {samples}, and at least {least} are needed")


def _inputs(rows: Mapping[str, Any], dtype: torch.dtype, where: str, start: int = 0) -> Inputs:
    """One batch. Raises ConfigError if a value is nan or infinite, or becomes so in `dtype`."""
    values = {name: _tensor(array) for name, array in rows.items()}
    for name, tensor in values.items():
        if tensor.is_floating_point():
            values[name] = tensor.to(dtype)
            finite = values[name].isfinite().unsqueeze(-1).flatten(1).all(1)
            if not finite.all():
                row, kind = start + int(finite.int().argmin()), str(dtype).removeprefix("torch.")
                raise ConfigError(f"{where}: sample {row}{_of(name)} holds nan or infinite values in {kind}")
    return Inputs((values[""],)) if "" in values else Inputs((), values)


def _tensor(rows: Any) -> Tensor:
    """A copy, because a model may overwrite its input and files are read again."""
    if isinstance(rows, Tensor):
        return rows.detach().clone()
    rows = np.asarray(rows)
    native = np.float64 if rows.dtype.kind == "f" else rows.dtype.newbyteorder("=")
    return torch.from_numpy(rows.astype(native))


def _of(name: str) -> str:
    return f" of {name}" if name else ""
