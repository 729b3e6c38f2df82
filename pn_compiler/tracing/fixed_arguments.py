"""What a trace assumes about the arguments of a call; nodes in its graph check it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

VARIES: Any = type("Varies", (), {"__repr__": lambda self: "<varies>"})()  # an argument of unknown value


def varies(value: Any) -> bool:
    """Whether an argument like `value` may vary from call to call: a number, or anything with tensors."""
    return any(
        isinstance(leaf, torch.Tensor | int | float) and not isinstance(leaf, bool)
        for leaf in pytree.tree_leaves(value)
    )


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in an argument."""
    leaves = [value] if isinstance(value, torch.Tensor) else pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@fx.node.has_side_effect
def check_fixed(value: Any, expected: Any, name: str) -> None:
    """Raises TypeError if an argument that the trace has fixed is passed another value."""
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", check_fixed, (value, expected, name), {})
    elif value is not expected and not (type(value) is type(expected) and value == expected):
        actual = f"of type {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
        raise TypeError(
            f"argument {name} is {actual}, but the model was converted with {name}={expected!r}; for another "
            "value, give transform example_inputs or example_kwargs that have it"
        )


@fx.node.has_side_effect
def check_shapes(value: Any, expected: Sequence[Sequence[int | None]], name: str) -> None:
    """Raises TypeError if the tensors in an argument do not have the shapes that the trace assumes.

    `expected` holds the sizes of each tensor, None for those that may vary.
    """
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", check_shapes, (value, expected, name), {})
        return
    actual = [tensor.shape for tensor in tensors_in(value)]
    if len(actual) != len(expected) or not all(map(_fits, actual, expected)):
        dims = ", ".join(str(len(shape)) for shape in actual) or "no"
        shapes = ", ".join(
            f"[{', '.join('*' if n is None else str(n) for n in shape)}]" for shape in expected
        )
        raise TypeError(
            f"argument {name} has {dims} dimensions, but the model, which asks for its shape, was converted "
            f"for {shapes}; give transform example_inputs that are like those of this call"
        )


def _fits(shape: torch.Size, expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(
        size is None or size == actual for actual, size in zip(shape, expected, strict=True)
    )
