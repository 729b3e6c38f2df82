"""Channels and axes: scale and shift go only where they certainly belong."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.graph.ranks import infer_ranks, rank
from pn_compiler.nn import ProxyNormAct
from pn_compiler.passes.channels import channels_of
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from pn_compiler.tracing.trace_module import trace_module
from tests.graph.test_operator_ranks import MODULES, TABLES, UNKNOWN
from tests.graph.test_ranks import Function, inferred
from tests.graph.test_ranks import X as EXAMPLE

X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two sites of 6 channels, a function of them and of the module, and a reader that fits."""

    def __init__(self, join: Callable[..., Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU())
        self.gray, self.four = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 4, 1)
        self.table = nn.Parameter(torch.randn(1, 2, 4, 4))
        self.join, self.layer = join, layer or nn.Identity()
        self.reader: nn.Module = nn.Identity()
        self.reader = _reader_of(self(X.float()))

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.join(self, x, self.one(x), self.two(x)))


def _reader_of(value: Tensor) -> nn.Module:
    if value.dim() == 2:
        return nn.Linear(value.shape[1], 3)
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[value.dim() - 3](value.shape[1], 3, 1)


def whole(net: nn.Module, converted: nn.Module) -> nn.Module:
    """The original, run by Python, with each BatchNorm and activation replaced by the whole site."""
    by_hand = copy.deepcopy(net)
    read = {site.name for site in pn_compiler.sites(converted) if site.kind == "pn"}
    for branch in ("one", "two"):
        if f"{branch}.1" not in read:
            continue
        site = copy.deepcopy(converted.get_submodule(f"{branch}.1"))
        assert isinstance(site, ProxyNormAct)
        site.outputs = ("output",)
        by_hand.get_submodule(branch)[1] = site  # type: ignore[operator]
        by_hand.get_submodule(branch)[2] = nn.Identity()  # type: ignore[operator]
    return by_hand


@torch.no_grad()
def check(net: nn.Module) -> None:
    """From scratch, with and without an example: the converted and the folded network equal `whole`."""
    net = randomize_batch_norms(net).double().eval()
    for example in (None, X):
        scratch = pn_compiler.transform(net, example, warm_start="none", proxy_padding="output")
        by_hand = whole(net, scratch)  # shares no parameters
        assert_same_outputs(scratch(X), by_hand(X), tolerance=1e-9)
        assert_same_outputs(pn_compiler.fold(scratch)(X), by_hand(X), tolerance=1e-7)
        warm = pn_compiler.transform(net, example)
        plain = pn_compiler.transform(net, example, proxy=False)
        assert_same_outputs(warm(X), plain(X), tolerance=1e-9)
        assert_same_outputs(pn_compiler.fold(warm)(X), plain(X), tolerance=1e-7)


def _wrong_shuffle(x: Tensor, groups: int) -> Tensor:
    """It mixes two samples."""
    n, c, h, w = x.shape
    y = x.reshape(n // 2, groups, c, h, w).transpose(1, 2).contiguous()
    return y.reshape(n // 2, c * 2, h, w)


JOINS: dict[str, Callable[..., Tensor]] = {
    "one channel + channels": lambda m, x, a, b: torch.cat([m.gray(x) + x, a], 1)[:, 1:5],
    "one channel + four": lambda m, x, a, b: torch.cat([m.gray(x) + m.four(x), a], 1)[:, 1:7],
    "one channel + a parameter": lambda m, x, a, b: torch.cat([m.gray(x) + m.table, a], 1)[:, 1:5],
    "a gate": lambda m, x, a, b: torch.cat([m.four(x) * m.gray(x).mean((2, 3), keepdim=True), a], 1)[:, 3:8],
    "a number": lambda m, x, a, b: torch.cat([m.gray(x) * 2 + 1, a], 1)[:, 1:],
    "in place": lambda m, x, a, b: torch.cat([m.four(x).add_(m.gray(x)), a], 1)[:, 2:],
    "the input": lambda m, x, a, b: torch.cat([x, a], 1)[:, 2:6],
    "keyword": lambda m, x, a, b: torch.cat(tensors=[a, b], dim=1)[:, 3:9],
    "negative dim": lambda m, x, a, b: torch.cat([a, b], dim=-3)[:, 5:],
    "rows": lambda m, x, a, b: torch.cat([a, b], dim=-2)[:, 1:],
    "every second": lambda m, x, a, b: torch.cat([a, b], 1)[:, ::2],
    "the last": lambda m, x, a, b: torch.cat([a, b], 1)[:, -7:],
    "all but": lambda m, x, a, b: a[:, 1:-1],
    "narrow": lambda m, x, a, b: torch.cat([a, b], 1).narrow(1, 4, 5),
    "narrow from the end": lambda m, x, a, b: torch.cat([a, b], 1).narrow(-3, -5, 5),
    "select": lambda m, x, a, b: a.select(1, 2).unsqueeze(1),
    "index_select": lambda m, x, a, b: a.index_select(1, torch.tensor([3, 0, 3])),
    "indices": lambda m, x, a, b: a[:, [2, 0, 5]],
    "uneven chunks": lambda m, x, a, b: torch.cat([a, b], 1).chunk(5, 1)[3],
    "fewer chunks": lambda m, x, a, b: torch.cat([b[:, 1:], a[:, :].chunk(4, -3)[-1]], 1),
    "a remainder": lambda m, x, a, b: torch.split(a, 4, 1)[1],
    "sizes": lambda m, x, a, b: a.split([1, 3, 2], dim=-3)[1],
    "tensor_split": lambda m, x, a, b: a.tensor_split(4, 1)[1],
    "unbind": lambda m, x, a, b: a.unbind(1)[2].unsqueeze(1),
    "flip": lambda m, x, a, b: a.flip(1),
    "roll": lambda m, x, a, b: torch.cat([a.roll(1, 1), b], 1),
    "expand": lambda m, x, a, b: torch.cat([m.gray(x).expand(-1, 2, -1, -1), a], 1)[:, 1:],
    "repeat": lambda m, x, a, b: torch.cat([m.gray(x).repeat(1, 2, 1, 1), a], 1)[:, 1:],
    "pixel_shuffle": lambda m, x, a, b: torch.cat([F.pixel_shuffle(m.four(x), 2)[..., :4, :4], a], 1)[:, :5],
    "a shuffle of batches": lambda m, x, a, b: _wrong_shuffle(a, 2),
    "batch of another": lambda m, x, a, b: a.view(a.view(4, 3, 4, 4).size(0), -1),
    "flattened": lambda m, x, a, b: a.view(a.size(0), -1),
    "flattened, by the input": lambda m, x, a, b: a.reshape(x.shape[0], -1),
    "a pool over channels": lambda m, x, a, b: F.avg_pool3d(a, (2, 1, 1)).flatten(1),
    "a padded pool over channels": lambda m, x, a, b: F.max_pool3d(b, (3, 1, 1), 1, (1, 0, 0)),
    "an adaptive pool over channels": lambda m, x, a, b: F.adaptive_avg_pool3d(a, (3, 2, 2)).flatten(1),
    "a pool over channels and pixels": lambda m, x, a, b: F.max_pool2d(a.flatten(2), (3, 1), 1, (1, 0)),
    "its average": lambda m, x, a, b: F.avg_pool2d(b.flatten(2), (2, 1)).flatten(1),
    "a pool over pixels": lambda m, x, a, b: F.max_pool1d(a.flatten(2), 2),
    "a branch pooled over channels": lambda m, x, a, b: torch.cat(
        [F.avg_pool3d(m.four(x), (3, 1, 1), 1), a], 1
    )[:, 1:5],
    "replication of channels": lambda m, x, a, b: F.pad(a, (0, 0, 0, 0, 1, 0), mode="replicate"),
    "replication in 3 axes": lambda m, x, a, b: F.pad(a.flatten(2), (0, 0, 1, 1), mode="replicate"),
    "indices of a pool": lambda m, x, a, b: F.max_pool2d(a, 2, 1, 0, 1, False, True)[0],
    "one sample": lambda m, x, a, b: a[0].unsqueeze(0),
}


@pytest.mark.parametrize("name", JOINS)
def test_nothing_goes_into_the_wrong_channels(name: str) -> None:
    check(Net(JOINS[name]))


OVER_CHANNELS = {
    "MaxPool3d": nn.MaxPool3d((2, 1, 1)),
    "AvgPool3d": nn.AvgPool3d((2, 1, 1)),
    "AdaptiveAvgPool3d": nn.AdaptiveAvgPool3d((3, 2, 2)),
    "AdaptiveMaxPool3d": nn.AdaptiveMaxPool3d((3, 2, 2)),
    "MaxPool2d": nn.Sequential(nn.Flatten(2), nn.MaxPool2d((2, 1))),
    "AvgPool2d": nn.Sequential(nn.Flatten(2), nn.AvgPool2d((2, 1))),
    "ReplicationPad2d": nn.Sequential(nn.Flatten(2), nn.ReplicationPad2d((0, 0, 1, -1))),
    "ReflectionPad3d": nn.ReflectionPad3d((0, 0, 0, 0, 1, -1)),
}


@pytest.mark.parametrize("name", OVER_CHANNELS)
def test_layers_that_take_a_batch_for_one_sample(name: str) -> None:
    """Channels are pooled or padded, and the features behind the flatten are no longer those of a channel."""
    check(Net(lambda m, x, a, b: m.layer(a).flatten(1), OVER_CHANNELS[name]))


def test_a_convolution_that_takes_a_batch_for_one_sample() -> None:
    """Conv3d on [N, C, H, W] mixes samples; 6 samples of 6 channels fit by accident."""
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv3d(6, 2, 1))
    net = randomize_batch_norms(net).double().eval()
    converted = pn_compiler.transform(net)
    assert [site.code for site in pn_compiler.sites(converted)] == ["PN202"]
    assert_same_outputs(converted(x), pn_compiler.transform(net, proxy=False)(x), tolerance=1e-9)


def test_what_is_known_is_exact_and_the_rest_is_unknown() -> None:
    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gray = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 1, 1)
            self.pool3 = nn.MaxPool3d(2, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            known = (
                y + self.gray(x), y * 2, torch.cat([y, y], -3), y[:, ::4], y[:, -2:], y.narrow(1, 1, 3),
                y.chunk(4, 1)[-1], y.split(4, 1)[1], F.max_pool2d(y, 2), F.interpolate(y, scale_factor=2),
                y.unsqueeze(0).flatten(2), y.view(2, 3, -1), y.mean((2, 3)), y[0], y[:, None],
            )  # fmt: skip
            unknown = (
                self.gray(x) + x, torch.cat([x, y], 1), torch.cat([y, y], 2), y[:, [0, 1]], y.chunk(4)[0],
                F.max_pool3d(y, 2, 1), self.pool3(y), y.flip(1), y.repeat(1, 2, 1, 1), y.squeeze(),
                F.avg_pool2d(x, 2),
            )  # fmt: skip
            return known + unknown

    gm, _, _ = trace_module(Values())
    infer_ranks(gm)
    values = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    assert [channels_of(gm, value) for value in values] == (
        [6, 6, 12, 2, 2, 3, 2, 2, 6, 6] + [None] * 5 + [None] * 11
    )
    assert [rank(value) for value in values] == (
        [4] * 10 + [3, 3, 2, 3, 5] + [None, 4, 4, None, 4, 4, 4, 4, None, None, None]
    )  # fmt: skip


OPERATORS = {**TABLES, **UNKNOWN}


class Channels(fx.Interpreter):
    """Compares the number of channels that is known of every node with its value."""

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, Tensor) and value.dim() > 1 and node.op != "get_attr":
            known = channels_of(self.module, node)  # type: ignore[arg-type]  # a GraphModule
            assert known in (value.shape[1], None), node.format_node()
        return value


@pytest.mark.parametrize("name", OPERATORS)
def test_no_number_of_channels_is_wrong(name: str) -> None:
    module = Function(lambda m, x: OPERATORS[name](m, m.conv(x))).eval()
    gm, _ = inferred(module, EXAMPLE)
    with torch.no_grad():
        Channels(gm).run(EXAMPLE)


@pytest.mark.parametrize(("layer", "view"), MODULES, ids=lambda value: type(value).__name__)
def test_no_number_of_channels_behind_a_layer_is_wrong(
    layer: nn.Module, view: Callable[[Tensor], Tensor]
) -> None:
    gm, _ = inferred(Function(lambda m, x: m.layer(view(m.conv(x))), layer).eval(), EXAMPLE)
    with torch.no_grad():
        Channels(gm).run(EXAMPLE)
