"""Runs a model in float64 without copying it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class Float64(TorchFunctionMode):
    """While active, functions get the parameters and buffers of `model` in float64, converted per call.

    The model computes what ``copy.deepcopy(model).double()`` does, but only the tensors of one operator are
    held twice. Depthwise convolutions, for which PyTorch has no fast float64 kernel, become sums of products,
    which takes a twentieth of the time.

    Args:
        model: left untouched. Its inputs must be float64 already.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = (*model.parameters(), *model.buffers())
        self.narrow = {id(t) for t in tensors if t.is_floating_point() and t.dtype != torch.float64}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # an attribute, such as x.shape
            return torch.float64 if func == _DTYPE and id(args[0]) in self.narrow else func(*args)
        args, kwargs = pytree.tree_map_only(Tensor, self._widen, (args, kwargs or {}))
        if func is torch.conv2d and _is_depthwise(args, kwargs):
            return _depthwise(*args)
        return func(*args, **kwargs)

    def _widen(self, tensor: Tensor) -> Tensor:
        return tensor.detach().double() if id(tensor) in self.narrow else tensor


_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]  # a property in Python


def _is_depthwise(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``conv2d(*args)``, as nn.Conv2d calls it, is depthwise with one output per input channel."""
    if kwargs or len(args) != 7 or isinstance(args[4], str):
        return False
    x, weight, groups = args[0], args[1], args[6]
    return bool(x.dim() == 4 and x.dtype == torch.float64 and weight.shape[:2] == (groups, 1))


def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """``conv2d`` for weight [C, 1, *kernel] and groups = C, tap by tap."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    spans = [(k - 1) * d for k, d in zip(weight.shape[2:], dilation, strict=True)]
    result = x.new_zeros(())
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            top, left = i * dilation[0], j * dilation[1]
            bottom, right = x.shape[2] - spans[0] + top, x.shape[3] - spans[1] + left
            tap = x[:, :, top : bottom : stride[0], left : right : stride[1]]
            result = result + tap * weight[:, 0, i, j].view(-1, 1, 1)
    return result if bias is None else result + bias.view(-1, 1, 1)
