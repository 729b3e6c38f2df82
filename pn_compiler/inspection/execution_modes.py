"""The torch modes that affect what an operator does and that a graph does not record."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint

_DEVICES = ("cpu", "cuda")
_CONTEXTS: tuple[type, ...] = (
    torch.no_grad,
    torch.enable_grad,
    torch.set_grad_enabled,
    torch.inference_mode,
    torch.autocast,
    torch.autograd.graph.saved_tensors_hooks,
)
# contexts opened in these files are not the forward's own: checkpoint, and set_grad_enabled in no_grad
_OWN_USES = (torch.utils.checkpoint.__file__, torch.autograd.grad_mode.__file__)


class ExecutionModes:
    """The open contexts and the flags of torch.

    A context counts even if it changes no flag: ``autocast(enabled=False)`` matters to users who call the
    model under autocast.
    """

    def __init__(self) -> None:
        self._open: list[int] = []

    def grad_aside(self) -> tuple[Any, ...]:
        """All modes except whether gradients are enabled, which torch.utils.checkpoint changes."""
        return (
            tuple(self._open),
            torch.is_inference_mode_enabled(),
            *(torch.is_autocast_enabled(device) for device in _DEVICES),
            *(torch.get_autocast_dtype(device) for device in _DEVICES),
            torch.get_default_dtype(),
            torch._C._len_torch_function_stack(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.mkldnn.enabled,
        )

    def now(self) -> tuple[Any, ...]:
        """A snapshot; it equals an earlier one if every operator still does the same."""
        return torch.is_grad_enabled(), self.grad_aside()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Records which contexts are open; those of autograd.Function and checkpoint do not count."""
        with contextlib.ExitStack() as patches:
            for cls in _CONTEXTS:
                patches.enter_context(_patched(cls, "__enter__", self._opening))
                patches.enter_context(_patched(cls, "__exit__", self._closing))
            # called as a function, it is never closed; as a decorator, it is created for each call
            patches.enter_context(_patched(torch.set_grad_enabled, "__init__", self._opening))
            patches.enter_context(_patched(torch.set_grad_enabled, "__call__", self._closing))
            yield

    def _opening(self, context: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(context, *args, **kwargs)
        if sys._getframe(2).f_code.co_filename not in _OWN_USES:
            self._open.append(id(context))
        return result

    def _closing(self, context: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._open = [opened for opened in self._open if opened != id(context)]
        return original(context, *args, **kwargs)


@contextlib.contextmanager
def _patched(cls: type, name: str, around: Callable[..., Any]) -> Iterator[None]:
    own = vars(cls).get(name)
    original = getattr(cls, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(self, original, *args, **kwargs)

    setattr(cls, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(cls, name)
        else:
            setattr(cls, name, own)
