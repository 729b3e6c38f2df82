"""Forwards that stay whole and may write into weights: no constant goes into those."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.inspection.weight_writes import may_write_weights
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def body() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))


class Net(nn.Module):
    """A branch on values keeps it whole; behind it `write` changes the last convolution of its body."""

    def __init__(self, write: Callable[["Net"], None]) -> None:
        super().__init__()
        self.body, self.write = body(), write

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() < 1e9:
            self.write(self)
        return self.body(x)

    def halve(self) -> None:
        self.body[3].weight.data = self.body[3].weight.data * 0.5


@torch.no_grad()
def copied(net: Any) -> None:
    net.body[3].weight.copy_(net.body[3].weight * 0.5)


def replaced(net: Any) -> None:
    net.body[3].weight = nn.Parameter(net.body[3].weight.detach() * 0.5)


def assigned(net: Any) -> None:
    net.body[3].bias.data = net.body[3].bias.data + 1


def named(net: Any) -> None:
    setattr(net.body[3], "weight", nn.Parameter(net.body[3].weight.detach() * 0.5))  # noqa: B010


@torch.no_grad()
def all_of_them(net: Any) -> None:
    for parameter in net.body.parameters():
        parameter *= 0.9  # noqa: PLW2901


def items(net: Any) -> None:
    net.body[3].weight.data[0] = 0.25


def scaled(weight: Tensor) -> None:
    weight.detach().mul_(0.5)


def loaded(net: Any) -> None:
    net.body[3].load_state_dict({key: value * 0.5 for key, value in net.body[3].state_dict().items()})


def initialised(net: Any) -> None:
    nn.init.ones_(net.body[3].weight)


WRITES: dict[str, Callable[[Any], None]] = {
    "copy_": copied,
    "a new parameter": replaced,
    "data": assigned,
    "setattr": named,
    "all parameters": all_of_them,
    "items": items,
    "load_state_dict": loaded,
    "init": initialised,
    "helper": lambda net: scaled(net.body[3].weight),
    "method": lambda net: net.halve(),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_folding_keeps_the_write(name: str, nested: bool) -> None:
    torch.manual_seed(0)
    net: nn.Module = Net(WRITES[name])
    net = randomize_batch_norms(nn.Sequential(net, nn.Conv2d(3, 2, 1)) if nested else net).eval()
    converted = pn_compiler.transform(net, warm_start="none")
    folded = pn_compiler.fold(converted)
    path = "0.body.1" if nested else "body.1"
    expected = copy.deepcopy(net)
    expected.set_submodule(path, copy.deepcopy(converted.get_submodule(path)))
    assert [site.name for site in pn_compiler.sites(converted)] == [path]
    with torch.no_grad():
        want = expected(X)  # the first call: some writes add up
        for module in (converted, folded):
            assert_same_outputs(module(X), want)


class Reads(nn.Module):
    """A branch on values and nothing that writes: its body is converted as it would be alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = body(), nn.Parameter(torch.ones(3, 1, 1))
        self.reset()

    def reset(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) * self.scale) if x.mean() < 1e9 else x


def test_what_only_reads_absorbs() -> None:
    assert not may_write_weights(Reads())
    assert may_write_weights(Net(copied))
    converted = pn_compiler.transform(randomize_batch_norms(Reads()).eval())
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(1, 1, 1), nn.BatchNorm2d(2), nn.LSTM(2, 2), nn.MultiheadAttention(2, 1)]
)
def test_layers_of_torch_write_no_weights(layer: nn.Module) -> None:
    assert not may_write_weights(layer)
