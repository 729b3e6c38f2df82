"""Tensors without values: fake tensors, and those on the meta device."""

import contextlib
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: Tensor) -> bool:
    """Whether `tensor` holds values: it is neither fake nor on the meta device."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def copy_fake(tensor: Tensor) -> Tensor:
    """Copies `tensor`; deepcopy fails on fake tensors."""
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def fake_mode(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The FakeTensorMode of `model`, so that new tensors are fake as well; else a null context."""
    first = first_fake(model)
    return contextlib.nullcontext() if first is None else first.fake_mode


def first_fake(model: nn.Module) -> FakeTensor | None:
    """The first parameter or buffer of `model` that is fake, or None."""
    return next((t for t in (*model.parameters(), *model.buffers()) if isinstance(t, FakeTensor)), None)
