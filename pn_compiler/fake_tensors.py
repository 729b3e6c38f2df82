"""Tensors without values: those of a fake mode, and on the meta device."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from pn_compiler.inputs import Inputs


def has_values(tensor: Tensor) -> bool:
    """Whether `tensor` holds numbers: not on the meta device, and not fake."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def copy_fake(tensor: Tensor) -> Tensor:
    """A copy of `tensor`, whose own deepcopy fails."""
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def fake_mode(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The mode in which fake tensors of `model` live, so that new ones are fake, too; else nothing."""
    first = _first_fake(model)
    return contextlib.nullcontext() if first is None else first.fake_mode


def _first_fake(model: nn.Module) -> FakeTensor | None:
    return next((t for t in (*model.parameters(), *model.buffers()) if isinstance(t, FakeTensor)), None)


def in_mode_of(model: nn.Module, inputs: Inputs | None) -> Inputs | None:
    """`inputs` as fake tensors of the mode of `model`, if that is made of fake tensors: others do not mix."""
    like = _first_fake(model)
    if inputs is None or like is None:
        return inputs

    def faked(x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor) and x.fake_mode is like.fake_mode:
            return x
        with like.fake_mode:
            device = like.device if x.is_meta else x.device
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    return inputs.map(faked)
