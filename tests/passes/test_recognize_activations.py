"""Activations that a model writes out by hand."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bn, self.conv, self.function = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.function(self.bn(x)))


class Swish(torch.autograd.Function):
    """The memory-efficient form, which torch.fx cannot enter."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


class SwishModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Swish.apply(x)


class Noisy(nn.Module):
    """A ReLU in eval mode only; torch.fx does not enter it because it asks for the mode of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e9 and self.training:
            x = x + torch.rand_like(x)
        return F.relu(x)


KNOWN = {
    "x sigmoid(x)": (lambda y: y * torch.sigmoid(y), "silu"),
    "x.mul_(x.sigmoid())": (lambda y: y.mul_(y.sigmoid()), "silu"),
    "x / (1 + exp(-x))": (lambda y: y / (1 + torch.exp(-y)), "silu"),
    "autograd function": (SwishModule(), "silu"),
    "x relu6(x + 3) / 6": (lambda y: y * F.relu6(y + 3) / 6, "hardswish"),
    "x hardsigmoid(x)": (lambda y: y * F.hardsigmoid(y), "hardswish"),
    "x tanh(softplus(x))": (lambda y: y * torch.tanh(F.softplus(y)), "mish"),
    "erf": (lambda y: 0.5 * y * (1 + torch.erf(y / math.sqrt(2))), "gelu"),
    "tanh": (lambda y: 0.5 * y * (1 + torch.tanh(0.7978845608 * (y + 0.044715 * y**3))), "gelu"),
    "max(x, 0.1 x)": (lambda y: torch.max(y, 0.1 * y), "leakyrelu"),
    "maximum": (lambda y: torch.maximum(y, torch.zeros_like(y)), "relu"),
    "where": (lambda y: torch.where(y > 0, y, torch.zeros_like(y)), "relu"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_by_their_values(name: str) -> None:
    function, activation = KNOWN[name]
    net = randomize_batch_norms(Written(function)).eval()
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert (site.kind, site.activation) == ("pn", activation)
    assert_same_outputs(converted(X), pn_compiler.transform(net, proxy=False)(X))
    assert_same_outputs(pn_compiler.fold(converted)(X), converted(X))


UNKNOWN: list[Callable[[Tensor], Tensor]] = [
    lambda y: y * torch.sigmoid(1.702 * y),  # nothing of torch.nn
    lambda y: y * torch.sigmoid(y.mean()),  # not elementwise
    lambda y: y * torch.sigmoid(y) + y.flip(-1),  # something else reads y
    Noisy(),
]


@pytest.mark.parametrize("function", UNKNOWN)
def test_others_are_left_alone(function: Callable[[Tensor], Tensor]) -> None:
    net = randomize_batch_norms(Written(function)).eval()
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert site.kind == "norm_only"
    expected = net.conv(function(converted.get_submodule("bn")(X)))
    assert_same_outputs(converted(X), expected)
