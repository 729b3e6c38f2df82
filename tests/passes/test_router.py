"""Which layers absorb a scale and a shift, which products are gates, and what absorbing computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.graph.ranks import infer_ranks
from pn_compiler.passes.absorption import Router, gate_of, put_into
from pn_compiler.testing import assert_same_outputs
from pn_compiler.tracing.trace_module import trace_module
from tests.passes.graphs import readers


class Absorbs(nn.Module):
    """A value of 6 channels, and layers that may absorb its scale and shift."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.bn, self.conv, self.linear = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1), nn.Linear(6, 6)
        self.same, self.reflect = nn.Conv2d(6, 2, 3, padding="same"), nn.Conv2d(6, 2, 3, 1, 1)
        self.reflect.padding_mode = "reflect"
        self.point, self.zeros = nn.Conv2d(6, 2, 1, padding="same"), nn.Conv2d(6, 2, 3, padding=(0, 1))
        self.groups, self.flat = nn.Conv2d(6, 6, 1, groups=3), nn.Linear(6 * 16, 2)
        self.other, self.odd = nn.Conv2d(4, 2, 1), nn.Linear(10, 2)
        self.transposed = nn.ConvTranspose2d(6, 2, 1)
        self.again = self.aliased = nn.Conv2d(6, 2, 1)
        self.hooked, self.own = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1)
        self.hooked.register_forward_hook(lambda module, args, output: output)
        self.own.forward = lambda x: x  # type: ignore[method-assign]
        self.computed = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 2, 1))
        self.tied, self.twin = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1)
        self.twin.weight = self.tied.weight
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.bn(x))


ABSORBING: dict[str, Callable[[Any, Tensor], Any]] = {
    "a convolution": lambda m, y: m.conv(y),
    "groups": lambda m, y: m.groups(y),
    "padded with values": lambda m, y: m.reflect(y),
    "padding that is none": lambda m, y: m.point(y),
    "a linear layer": lambda m, y: m.linear(y.mean((2, 3))),
    "a linear layer of pixels": lambda m, y: m.flat(y.flatten(1)),
}
PADDING: dict[str, Callable[[Any, Tensor], Any]] = {
    "padded with zeros": lambda m, y: m.zeros(y),
    "padded to the same size": lambda m, y: m.same(y),
}
BLOCKING: dict[str, Callable[[Any, Tensor], Any]] = {
    "the output": lambda m, y: y,
    "a function": lambda m, y: y + 1,
    "another layer": lambda m, y: m.transposed(y),
    "a keyword": lambda m, y: m.conv(input=y),
    "called twice": lambda m, y: (m.conv(y), m.conv(y)),
    "under two names": lambda m, y: m.aliased(y) + m.again(y),
    "hooks": lambda m, y: m.hooked(y),
    "a forward of its own": lambda m, y: m.own(y),
    "a computed weight": lambda m, y: m.computed(y),
    "a tied weight": lambda m, y: m.tied(y).mean() + m.twin(torch.ones_like(y)),
    "a weight that is read": lambda m, y: (m.conv(y), m.conv.weight + 1),
    "the last axis": lambda m, y: m.linear(y[..., :1].expand(-1, -1, -1, 6)),
    "the last of three": lambda m, y: m.linear(F.avg_pool2d(y, (1, 4)).expand(-1, -1, -1, 6)),
    "one sample": lambda m, y: m.conv(y[0]),
}


def route(function: Callable[[Any, Tensor], Any], *, through_padding: bool) -> tuple[int, int]:
    """How many calls absorb the affine of the value, and how many are blocked."""
    gm, value, _ = readers(Absorbs(function))
    found = Router(gm, through_padding=through_padding).route(value, 6)
    return len(found.absorbers), len(found.blocked)


@pytest.mark.parametrize("name", ABSORBING)
def test_what_absorbs(name: str) -> None:
    for through_padding in (True, False):
        assert route(ABSORBING[name], through_padding=through_padding) == (1, 0)


@pytest.mark.parametrize("name", PADDING)
def test_zeros_are_in_the_way_of_a_shift(name: str) -> None:
    assert route(PADDING[name], through_padding=True) == (1, 0)
    assert route(PADDING[name], through_padding=False) == (0, 1)


@pytest.mark.parametrize("name", BLOCKING)
def test_what_does_not_absorb(name: str) -> None:
    absorbers, blocked = route(BLOCKING[name], through_padding=True)
    assert absorbers == 0
    assert blocked > 0


def test_layers_of_other_sizes_do_not_absorb() -> None:
    gm, value, (odd, other) = readers(Absorbs(lambda m, y: (m.odd(y.mean((2, 3))), m.other(y))))
    router = Router(gm, through_padding=True)
    assert router.refusal(odd, odd.all_input_nodes[0], 6) is not None
    assert router.refusal(other, value, 6) is not None


def test_a_linear_layer_on_an_input_of_unknown_rank_does_not_absorb() -> None:
    gm, _, _ = trace_module(nn.Sequential(nn.Linear(6, 2)))
    infer_ranks(gm)
    value, linear, _ = gm.graph.nodes
    assert Router(gm, through_padding=True).refusal(linear, value, 6) is not None


GATES: dict[str, tuple[bool, Callable[[Any, Tensor], Any]]] = {
    "mean": (True, lambda m, y: y * m.linear_gate(y.mean((2, 3), keepdim=True))),
    "from the end": (True, lambda m, y: torch.mul(y.mean((-1, -2), keepdim=True).sigmoid(), y)),
    "adaptive pool": (True, lambda m, y: y * F.adaptive_avg_pool2d(y, 1).sigmoid()),
    "an adaptive layer": (True, lambda m, y: y * m.pool(y)),
    "of another value": (True, lambda m, y: y * (y + 1).mean((2, 3), keepdim=True)),
    "a sum": (False, lambda m, y: y + y.mean((2, 3), keepdim=True)),
    "of pixels": (False, lambda m, y: y * y.sigmoid()),
    "of four pixels": (False, lambda m, y: y * F.adaptive_avg_pool2d(y, 2).mean(2, keepdim=True)),
    "of rows": (False, lambda m, y: y * y.mean(2, keepdim=True)),
    "of two values": (False, lambda m, y: y * (y.mean((2, 3), keepdim=True) + y.amax((2, 3), keepdim=True))),
    "itself": (False, lambda m, y: y * y),
    "a number": (False, lambda m, y: y * 2),
}


@pytest.mark.parametrize("name", GATES)
def test_which_products_are_gates(name: str) -> None:
    is_gate, function = GATES[name]
    model = Absorbs(function)
    model.linear_gate, model.pool = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Sigmoid()), nn.AdaptiveAvgPool2d(1)
    gm, value, product = readers(model)
    assert (gate_of(gm, product, value) is not None) is is_gate


@pytest.mark.parametrize("name", ABSORBING)
@torch.no_grad()
def test_what_is_put_into_a_layer_is_as_if_applied_before_it(name: str) -> None:
    torch.manual_seed(0)
    model = Absorbs(ABSORBING[name]).double().eval()
    scale, shift = torch.rand(6).double() + 0.5, torch.randn(6).double()
    y = torch.randn(2, 6, 4, 4).double()
    expected = model.function(model, y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
    gm, value, _ = readers(model)
    (absorber,) = Router(gm, through_padding=True).route(value, 6).absorbers
    put_into(gm, absorber, scale, shift)
    assert_same_outputs(model.function(model, y), expected)
