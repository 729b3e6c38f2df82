"""Axes besides the batch that a file takes in any size."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pn_compiler.base.errors import ConfigError, ExportError, first_line
from pn_compiler.running.evaluation import untouched
from pn_compiler.running.inputs import Inputs

#: Rank of an input -> the axes that have a letter.
_LETTERS = {2: {"L": 1}, 3: {"L": 2}, 4: {"H": 2, "W": 3}, 5: {"D": 2, "H": 3, "W": 4}}
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
#: By which the other size differs, the first that the network takes: most halve it five times.
_STEPS = (32, -32, 8, -8, 2, -2)

DynamicAxesOption = Sequence[str] | Mapping[str, Mapping[int, str]]


def check_axes(axes: Any) -> None:
    """Raises ConfigError unless `axes` is a list of letters, or axes and their names for inputs by name."""
    if isinstance(axes, Mapping):
        tables = list(axes.values())
        fine = all(isinstance(t, Mapping) and all(type(axis) is int for axis in t) for t in tables)
        names = [name for table in tables for name in table.values()] if fine else [None]
    else:
        names = list(axes) if isinstance(axes, tuple | list) else [None]
    known = {letter for letters in _LETTERS.values() for letter in letters}
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "batch":
            raise ConfigError(
                f"dynamic_axes={axes!r:.80}: expected letters such as ('H', 'W'), or names of axes by input, "
                "such as {'x': {2: 'height', 3: 'width'}}; the batch is dynamic_batch"
            )
        if not isinstance(axes, Mapping) and name not in known:
            raise ConfigError(
                f"dynamic_axes: {name!r} is none of the letters {', '.join(sorted(known))}; in Python axes "
                "have names of your own, as in {'x': {2: 'height'}}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class DynamicAxes:
    """The axes of the inputs of a call that may have any size.

    Attributes:
        names: of each tensor, in the order of `Inputs.tensors`: axis -> name. Equal names, equal sizes.
    """

    names: tuple[Mapping[int, str], ...] = ()

    @classmethod
    def of(cls, option: DynamicAxesOption, model: nn.Module, inputs: Inputs) -> "DynamicAxes":
        """What the user asks for, for inputs of `model`.

        Raises:
            ConfigError: there is no such input or axis, or sizes under one name differ.
        """
        given = inputs.by_name(model)
        leaves = pytree.tree_flatten_with_path(given)[0]
        places = [(str(path[0])[2:-2], len(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
        if any(leaf is not tensor for (*_, leaf), tensor in zip(places, inputs.tensors(), strict=True)):
            raise ConfigError("dynamic_axes: give example_kwargs in the order of the parameters of forward")
        if isinstance(option, Mapping):
            names = _by_name(option, places)
        else:
            names = [
                {axis: letter for letter, axis in _LETTERS.get(leaf.dim(), {}).items() if letter in option}
                for _, _, leaf in places
            ]
            found = {name for table in names for name in table.values()}
            if missing := [letter for letter in option if letter not in found]:
                raise ConfigError(
                    f"dynamic_axes: no input has an axis {', '.join(missing)}: images are [N, C, H, W], "
                    "volumes [N, C, D, H, W], sequences [N, C, L] or [N, L]"
                )
        result = cls(tuple(names))
        result._check_sizes([leaf for _, _, leaf in places])
        return result

    def _check_sizes(self, tensors: Sequence[Tensor]) -> None:
        sizes: dict[str, int] = {}
        for tensor, table in zip(tensors, self.names, strict=True):
            for axis, name in table.items():
                if sizes.setdefault(name, tensor.shape[axis]) != tensor.shape[axis]:
                    raise ConfigError(f"dynamic_axes: the axes {name} have different sizes in the example")

    def dims(self, batch: Any) -> Iterator[dict[int, Any] | None]:
        """For each tensor, what torch.export needs to know of its axes; `batch` is that of the first."""
        for table in self.names:
            found: dict[int, Any] = dict.fromkeys(table, torch.export.Dim.DYNAMIC)
            yield (found if batch is None else {0: batch} | found) or None

    def sizes(self, inputs: Inputs) -> str:
        """Such as "H=64, W=96"."""
        found = {
            name: tensor.shape[axis]
            for tensor, table in zip(inputs.tensors(), self.names, strict=True)
            for axis, name in table.items()
        }
        return ", ".join(f"{name}={size}" for name, size in found.items())

    def resized(self, model: nn.Module, inputs: Inputs) -> Inputs:
        """Inputs of other sizes, on which `model` runs; each named axis differs by a step of its own.

        Raises:
            ExportError: there are none.
        """
        first: Exception | None = None
        for step in _STEPS:
            error = self._failure(model, inputs, step)
            if error is None:
                return self._moved(inputs, step)
            first = first or error
        assert first is not None
        raise ExportError(
            f"the network does not run on other sizes than {self.sizes(inputs)}: {first_line(first)}; leave "
            "out --dynamic (dynamic_axes)"
        ) from first

    def _failure(self, model: nn.Module, inputs: Inputs, step: int) -> Exception | None:
        """Why `model` does not run on other sizes; None if it does."""
        try:
            with untouched(model, keep_state=True):
                self._moved(inputs, step).call(model)
        except Exception as error:  # a forward can raise anything on sizes that it does not take
            return error
        return None

    def _moved(self, inputs: Inputs, step: int) -> Inputs:
        order = list(dict.fromkeys(name for table in self.names for name in table.values()))
        tables = iter(self.names)
        generator = torch.Generator().manual_seed(1)

        def moved(tensor: Tensor) -> Tensor:
            shape = list(tensor.shape)
            for axis, name in next(tables).items():
                shape[axis] += step * (1 + order.index(name))
            if tensor.is_floating_point():
                return _like(tensor, shape, generator)
            return tensor.flatten()[torch.randint(tensor.numel(), shape, generator=generator)]

        return inputs.map(moved)


def _like(tensor: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Noise with mean and deviation of `tensor`."""
    deviation = tensor.std() if tensor.numel() > 1 else tensor.new_tensor(1)
    return (torch.randn(shape, generator=generator) * (deviation or 1.0) + tensor.mean()).to(tensor.dtype)


def _by_name(
    option: Mapping[str, Mapping[int, str]], places: Sequence[tuple[str, int, Tensor]]
) -> list[dict[int, str]]:
    """For each tensor: axis -> name; `places` are parameters of forward with the depth of the tensor in them.

    Raises:
        ConfigError: there is no such tensor or axis.
    """
    plain = [name for name, depth, _ in places if depth == 1]
    if unknown := [name for name in option if name not in plain]:
        raise ConfigError(f"dynamic_axes: no input {', '.join(unknown)}: there are {', '.join(plain)}")
    result = []
    for name, depth, tensor in places:
        table = option.get(name, {}) if depth == 1 else {}
        inner = range(1, tensor.dim())
        if bad := [axis for axis in table if axis not in inner and axis + tensor.dim() not in inner]:
            raise ConfigError(
                f"dynamic_axes: {name} {list(tensor.shape)} has no axis {bad[0]} besides the batch"
            )
        result.append({axis % tensor.dim(): label for axis, label in table.items()})
    return result
