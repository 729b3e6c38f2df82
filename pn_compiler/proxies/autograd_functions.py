"""Calls of `torch.autograd.Function` in a trace: one operator each, with its own backward."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointFunction

Record = Callable[[type[Function], tuple[Any, ...], dict[str, Any]], Any]

_recorders: list[Record] = []  # the trace that runs, if one does


class FunctionCall(nn.Module):
    """A layer that applies an autograd function, whose class a graph cannot hold.

    Args:
        function: applied to whatever the layer is called with.
    """

    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return self.function.__qualname__


@contextlib.contextmanager
def recorded_functions(record: Record) -> Iterator[None]:
    """Calls `record` instead of ``Function.apply``.

    Names bound earlier, such as ``swish = Swish.apply``, hold the method itself, so its code is replaced.
    """
    method = Function.apply.__func__  # type: ignore[attr-defined]
    original = method.__code__
    method.__code__ = _recording_code()
    _recorders.append(record)
    try:
        yield
    finally:
        _recorders.remove(record)
        method.__code__ = original


def apply_original(function: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls the original ``function.apply``, without recording."""
    return _ORIGINAL(function, *args, **kwargs)


def runs_given_code(function: type[Function]) -> bool:
    """Whether `function` only calls a function passed to it, as activation checkpointing does."""
    return function is CheckpointFunction


def _copied(method: Any) -> Callable[..., Any]:
    return types.FunctionType(
        method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__
    )


_ORIGINAL = _copied(Function.apply.__func__)  # type: ignore[attr-defined]


def _recording_code() -> types.CodeType:
    """Code with as many free variables as ``Function.apply``, which names its class for super()."""
    free = None

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        from pn_compiler.proxies.autograd_functions import record_call  # the globals are those of torch

        return record_call(cls, args, kwargs, free)

    return apply.__code__


def record_call(
    function: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any], free: Any = None
) -> Any:
    """Passes a call to the running trace; `free` is what ``Function.apply`` closes over."""
    return _recorders[-1](function, args, kwargs)
