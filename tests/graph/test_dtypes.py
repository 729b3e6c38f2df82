"""Integers and booleans keep the operators that they came with; floating-point values are recognised."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.graph.dtypes import is_floating

X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.tensor([0, 7])

ON_INTEGERS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp max": lambda i: i.clamp(max=3),
    "clamp min": lambda i: i.clamp(min=1),
    "clamp min 0": lambda i: i.clamp(min=0),
    "clamp both": lambda i: i.clamp(1, 3),
    "clamp as relu6": lambda i: i.clamp(0, 6),
    "clamp_": lambda i: (i + 0).clamp_(max=3),
    "clamp_min": lambda i: i.clamp_min(2),
    "clamp_max": lambda i: torch.clamp_max(i, 2),
    "clip": lambda i: torch.clip(i, 0, 2),
    "clamp to float": lambda i: i.clamp(max=3.5),
    "relu": F.relu,
    "relu_": lambda i: F.relu_(i + 0),
    "hardtanh": lambda i: F.hardtanh(i, 0, 3),
    "relu6": F.relu6,
    "where": lambda i: torch.where(i > 2, i, 0),
    "maximum": lambda i: torch.maximum(i, torch.zeros_like(i)),
    "abs": lambda i: i.abs(),
    "remainder": lambda i: i % 3,
    "sum": lambda i: (i - 1).clamp(max=3),
    "masked": lambda i: i * (i > 0),
    "negated": lambda i: -(-i).clamp(max=-1),
    "floor division": lambda i: operator.ifloordiv(i + 0, 2),
    "of a comparison": lambda i: (i > 2).long().clamp(max=1),
    "other integers": lambda i: i.to(torch.int32).clamp(max=3),
    "unsigned": lambda i: i.to(torch.uint8).clamp(min=1),
    "sigmoid": torch.sigmoid,
}


class Net(nn.Module):
    """A site, and `on_integers` of an input and of what is computed of the input image."""

    def __init__(self, on_integers: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.on_integers = (on_integers,)
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (on_integers,) = self.on_integers
        places = on_integers(x.flatten(1).argmax(1))
        return self.last(F.relu(self.norm(self.conv(x)))), on_integers(i), places


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("how", ON_INTEGERS)
def test_integers_are_computed_as_before(how: str, given: bool) -> None:
    net = Net(ON_INTEGERS[how]).eval()
    converted = pn_compiler.transform(net, (X, NUMBERS) if given else None)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    for result in (converted, pn_compiler.fold(converted)):
        for actual, expected in zip(result(X, NUMBERS)[1:], net(X, NUMBERS)[1:], strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)  # the dtype, too


CLAMPED: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda y: y.clamp(0, 40),
    "view": lambda y: y.view(y.shape[0], 4, 25).clamp(max=3),
    "sum": lambda y: (y + 1).clamp(-2, 2),
    "pieces": lambda y: y.chunk(2, 1)[1].clamp(0, 3),
    "pool": lambda y: F.max_pool2d(y, 2).clamp(max=1),
    "where": lambda y: torch.where(y > 1, y, 0).clamp_max(5),
}


class Clamps(nn.Module):
    def __init__(self, clamp: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.clamp = (clamp,)
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.clamp[0](self.norm(self.conv(x)))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("how", CLAMPED)
def test_clamps_behind_layers_are_recognised(how: str, given: bool) -> None:
    converted = pn_compiler.transform(Clamps(CLAMPED[how]).eval(), X if given else None)
    left = [n for n in converted.graph.nodes if "clamp" in str(n.target) and n.op == "call_method"]
    assert not left


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "input": lambda x: x,
    "indices of a pool": lambda x: F.max_pool2d(torch.sigmoid(x), 2, return_indices=True)[1],
    "other reading of the bits": lambda x: torch.sigmoid(x).view(torch.int32),
    "places": lambda x: torch.sigmoid(x).argmax(1),
    "cast": lambda x: torch.sigmoid(x).to(torch.int64),
    "rounded division": lambda x: torch.div(x, 2, rounding_mode="floor"),
}


@pytest.mark.parametrize("how", UNKNOWN)
def test_what_may_be_integers_is_not_said_to_be_floating(how: str) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return UNKNOWN[how](x)

    gm = torch.fx.symbolic_trace(Plain())
    (last,) = next(iter(reversed(gm.graph.nodes))).all_input_nodes
    assert is_floating(gm, last) is None


def test_bits_are_no_values() -> None:
    """A clamp of the bits of a BatchNorm's output is no activation of it."""
    net = Clamps(lambda y: y.view(torch.int32).clamp(min=0).view(torch.float32)).eval()
    converted = pn_compiler.transform(net, X)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]
