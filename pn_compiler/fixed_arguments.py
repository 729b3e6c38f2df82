"""What a trace takes for granted of the arguments of a call: nodes of its graph check it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

VARIES: Any = type("Varies", (), {"__repr__": lambda self: "<varies>"})()  # an argument of unknown value


def varies(value: Any) -> bool:
    """Whether an argument like `value` may take other values in other calls: a number, or with tensors."""
    return any(
        isinstance(leaf, torch.Tensor | int | float) and not isinstance(leaf, bool)
        for leaf in pytree.tree_leaves(value)
    )


def ranks_of(value: Any) -> tuple[int, ...]:
    """The number of dimensions of each tensor in an argument."""
    if isinstance(value, torch.Tensor):
        return (value.dim(),)
    return tuple(leaf.dim() for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


@fx.node.has_side_effect
def check_fixed(value: Any, expected: Any, name: str) -> None:
    """Raises TypeError if an argument that tracing has fixed comes with another value."""
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", check_fixed, (value, expected, name), {})
    elif value is not expected and not (type(value) is type(expected) and value == expected):
        told = f"of type {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
        raise TypeError(
            f"argument {name} is {told}, but the model was converted with {name}={expected!r}; for another "
            "value, give transform example_inputs or example_kwargs that have it"
        )


@fx.node.has_side_effect
def check_ranks(value: Any, expected: Sequence[int], name: str) -> None:
    """Raises TypeError if the tensors in an argument have other numbers of dimensions than in the example."""
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", check_ranks, (value, expected, name), {})
    elif (actual := ranks_of(value)) != tuple(expected):
        raise TypeError(
            f"argument {name} has {_listed(actual)} dimensions, but the model, which asks for that, was "
            f"converted with {_listed(expected)}; give transform example_inputs that have as many"
        )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) or "no"
