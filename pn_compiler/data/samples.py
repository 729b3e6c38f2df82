"""Samples of a data set held in memory, drawn in any order and joined into batches."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pn_compiler.base.errors import ConfigError
from pn_compiler.running.evaluation import batches_of, each_batch, labels_of, run, with_inputs
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.losses import named_outputs, relative_l2

_HELD_BYTES = 2**30  # of samples
_KEPT_BYTES = 2**28  # of a teacher's outputs
_SAME = 1e-2  # largest relative difference that float16 rounding explains


@dataclasses.dataclass(frozen=True, slots=True)
class Samples:
    """The inputs of a model, split into pieces.

    Attributes:
        pieces: (args, kwargs) of each piece: a batch of one sample, or a whole batch.
        whole: whether the pieces are the original batches, which cannot be split or joined.
        labels: of each piece, if they were asked for.
    """

    pieces: list[Any]
    whole: bool
    labels: list[Any] = dataclasses.field(default_factory=list)

    @classmethod
    def read(
        cls,
        batches: Any,
        model: nn.Module,
        most: int,
        title: str = "distillation data",
        *,
        labelled: bool = False,
    ) -> "Samples":
        """Reads the first samples in `batches` onto the device of `model`: up to `most`, or up to 1 GB.

        Batches are split if `model` computes the same for two samples together as for each alone. Otherwise
        they stay whole: images of different sizes, lists of images, an output for the whole batch.

        Args:
            batches: as for `batches_of` in `evaluation`; read once, and no further than needed.
            model: run on two samples, in its current mode.
            most: number of samples; a batch whose tensors share no first axis counts as one.
            title: title of the progress bar, also used in messages.
            labelled: whether batches are (inputs, labels), of which labels are kept, too.

        Raises:
            ConfigError: there is no batch, or one holds values that are nan or infinite; or it has no labels.
        """
        read: list[Any] = []
        pieces: list[Any] = []
        labels: list[Any] = []  # of each of `read`
        counts: list[int] = []
        size = 0
        batches = batches_of(batches)
        for _, inputs in each_batch(model, _noting(batches, labels, model) if labelled else batches, title):
            arguments = (inputs.args, dict(inputs.kwargs))
            parts = cut(arguments) or [arguments]
            read.append(arguments)
            counts.append(len(parts))
            pieces += parts[: most - len(pieces)]
            size += sum(tensor.nbytes for tensor in inputs.tensors())
            if len(pieces) >= most or size >= _HELD_BYTES:
                break
        if _alike(pieces) and len(pieces) > 1 and _independent(model, pieces[:2]):
            return cls(pieces, whole=False, labels=_entries(labels, counts)[: len(pieces)])
        return cls(read, whole=True, labels=labels)

    def __len__(self) -> int:
        return len(self.pieces)

    def divide(self, held_out: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(indices of the held-out samples, indices of the others), in random order, at least one of each.

        Raises:
            ConfigError: there is only one sample.
        """
        if len(self) < 2:
            what = "batch, which cannot be cut into samples" if self.whole else "sample"
            raise ConfigError(f"there is one {what}: at least two are needed, one of them to be held out")
        count = min(max(1, round(held_out * len(self))), len(self) - 1)
        order = torch.randperm(len(self), generator=generator)
        return order[:count], order[count:]

    def inputs(self, rows: Iterable[int]) -> Inputs:
        """One batch of the pieces `rows`, copied so that the model may overwrite it."""
        return Inputs(*join([self.pieces[row] for row in rows]))

    def labels_of(self, rows: Sequence[int]) -> Any:
        """The labels of the pieces `rows`, joined if they are tensors; else a list with one for each."""
        if self.whole:
            return self.labels[rows[0]]
        entries = [self.labels[row] for row in rows]
        return join(entries) if all(map(cut, entries)) and _alike(entries) else entries

    def digest(self) -> str:
        """A hash of all values."""
        values = [*self.pieces, *self.labels]
        return digest(value for piece in values for value in pytree.tree_leaves(piece))


class Outputs:
    """A teacher's outputs for samples, computed only once if they take at most 256 MB.

    Args:
        teacher: run in its current mode.
        samples: its inputs.
        size: number of samples per call.

    Raises:
        ConfigError: the teacher does not run on the samples, or its outputs are nan or infinite.
    """

    def __init__(self, teacher: nn.Module, samples: Samples, size: int) -> None:
        self._teacher, self._samples = teacher, samples
        self._kept = self._keep(size)

    def __call__(self, rows: Sequence[int]) -> Any:
        """The outputs for a batch of the samples `rows`."""
        return self._compute(rows) if self._kept is None else join([self._kept[row] for row in rows])

    def _compute(self, rows: Sequence[int]) -> Any:
        outputs = run(self._teacher, self._samples.inputs(rows), "a batch for the teacher")
        for name, tensor in named_outputs(outputs).items():
            if not tensor.isfinite().all():
                raise ConfigError(f"{name} of the teacher holds nan or infinite values")
        return outputs

    def _keep(self, size: int) -> list[Any] | None:
        """The outputs of each sample; None if they are too large, or not a nesting of tensors."""
        kept: list[Any] = []
        held = 0
        total = len(self._samples)
        for rows in torch.split(torch.arange(total), size):
            outputs = self._compute(rows.tolist())
            parts = [outputs] if len(rows) == 1 else cut(outputs)
            held += sum(tensor.nbytes for tensor in named_outputs(outputs).values())
            expected = held / (len(kept) + len(rows)) * total  # to give up early
            if parts is None or len(parts) != len(rows) or expected > _KEPT_BYTES:
                return None
            kept += parts
        return kept


def cut(values: Any) -> list[Any] | None:
    """One structure per entry of the first axis; None if its tensors do not share that axis."""
    leaves, spec = pytree.tree_flatten(values)
    if not all(isinstance(leaf, Tensor | bool | int | float | None) for leaf in leaves):
        return None
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves if isinstance(leaf, Tensor)}
    if len(lengths) != 1 or lengths == {0}:
        return None
    (length,) = lengths
    columns = [torch.split(leaf, 1) if isinstance(leaf, Tensor) else (leaf,) * length for leaf in leaves]
    return [pytree.tree_unflatten(row, spec) for row in zip(*columns, strict=True)]


def join(pieces: Sequence[Any]) -> Any:
    """The inverse of `cut`; it copies. A single piece may be anything."""
    if len(pieces) == 1:
        return pytree.tree_map_only(Tensor, torch.clone, pieces[0])
    columns = zip(*map(pytree.tree_leaves, pieces), strict=True)
    joined = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return pytree.tree_unflatten(joined, pytree.tree_structure(pieces[0]))


def joined(batches: Sequence[Any], counts: Sequence[int]) -> Any:
    """`batches` of `counts` samples as one structure; None if they share no first axis of that length."""
    pieces: list[Any] = []
    for batch, count in zip(batches, counts, strict=True):
        parts = cut(batch)
        if parts is None or len(parts) != count:
            return None
        pieces += parts
    return join(pieces) if _alike(pieces) else None


def _noting(batches: Iterable[Any], labels: list[Any], model: nn.Module) -> Iterator[Any]:
    """`batches` of inputs of `model`, whose labels are appended to `labels` as they are read."""
    for number, given in enumerate(batches, start=1):
        batch = with_inputs(given, model)
        labels.append(labels_of(batch, f"batch {number}"))
        yield batch


def _entries(labels: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """The labels of each sample of batches of `counts` samples. Raises ConfigError if a batch has others."""
    entries: list[Any] = []
    for number, (given, count) in enumerate(zip(labels, counts, strict=False), start=1):
        values = given
        numbers = isinstance(given, list | tuple) and all(isinstance(x, bool | int | float) for x in given)
        if isinstance(given, np.ndarray) or (numbers and len(given) > 0):
            values = torch.as_tensor(given)
        parts = cut(values)
        if (parts is None or len(parts) != count) and isinstance(values, list | tuple):
            parts = list(values)
        if parts is None or len(parts) != count:
            raise ConfigError(
                f"the labels of batch {number} are not those of its {count} samples: one for each is needed"
            )
        entries += parts
    return entries


def digest(values: Iterable[Any]) -> str:
    """A hash of tensors, including their shapes and dtypes, and of the repr of other values."""
    result = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            result.update(f"{value.dtype} {list(value.shape)}".encode())
            result.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            result.update(repr(value).encode())
    return result.hexdigest()


def _alike(pieces: list[Any]) -> bool:
    """Whether the pieces differ only in the values of tensors, so that any of them can be joined."""

    def form(piece: Any) -> list[Any]:
        leaves, spec = pytree.tree_flatten(piece)
        return [spec, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)]

    first = form(pieces[0])
    return all(form(piece) == first for piece in pieces)


def _independent(model: nn.Module, pieces: list[Any]) -> bool:
    """Whether `model` computes the same for `pieces` together as for each alone."""
    try:
        alone = [named_outputs(Inputs(*join([piece])).call(model)) for piece in pieces]
        together = named_outputs(Inputs(*join(pieces)).call(model))
        differences = [
            relative_l2(torch.cat([outputs[name] for outputs in alone]).double(), tensor.double())
            for name, tensor in together.items()
        ]
    except Exception:  # the first axis is not a batch: a model can raise anything on half of its input
        return False
    return all(bool(difference <= _SAME**2) for difference in differences)
