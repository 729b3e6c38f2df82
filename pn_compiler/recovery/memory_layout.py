"""The memory layout in which convolutional networks train fastest on CPUs."""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pn_compiler.nn.normalizers import straightened


@contextlib.contextmanager
def channels_last(*models: nn.Module) -> Iterator[None]:
    """Stores the kernels of 2-d convolutions channels-last, and so the activations behind them.

    A step of a mobile network on a CPU then takes two thirds of the time: docs/distillation.md. Values stay
    the same, and at the end kernels are stored as before. Those that share their memory are left as they are.
    """
    kernels = [kernel for model in models for kernel in _kernels(model)]
    with contextlib.ExitStack() as stack:
        for norm in (m for model in models for m in model.modules() if isinstance(m, nn.GroupNorm)):
            stack.callback(norm.register_forward_pre_hook(_straighten).remove)
        for kernel in kernels:
            stack.callback(_store, kernel, torch.contiguous_format)
            _store(kernel, torch.channels_last)
        yield


def _kernels(model: nn.Module) -> list[nn.Parameter]:
    tensors = [*model.parameters(), *model.buffers()]
    if not all(type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided for x in tensors):
        return []
    uses = collections.Counter(x.untyped_storage().data_ptr() for x in tensors)
    return [
        p
        for p in model.parameters()
        if p.ndim == 4 and p.device.type == "cpu" and p.is_contiguous() and not p.is_inference()
        if uses[p.untyped_storage().data_ptr()] == 1
    ]


def _store(kernel: nn.Parameter, layout: torch.memory_format) -> None:
    kernel.data = kernel.data.contiguous(memory_format=layout)


def _straighten(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *rest = args
    return straightened(x), *rest
