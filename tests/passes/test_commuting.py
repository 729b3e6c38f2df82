"""What commutes with a scale and a shift per channel: that it does, in float64, and what does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pn_compiler.graph.ranks import infer_ranks
from pn_compiler.operators.op_names import reads_shape
from pn_compiler.passes.absorption import commutes
from pn_compiler.running.inputs import Inputs
from pn_compiler.testing import assert_same_outputs
from pn_compiler.tracing.trace_module import trace_module
from tests.graph.test_ranks import Function, inferred
from tests.graph.test_ranks import X as EXAMPLE

X = torch.randn(2, 6, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SCALE = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
SHIFT = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Reader(nn.Module):
    """A value, [N, 6, *], and what one layer or function makes of it."""

    def __init__(self, norm: nn.Module, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.bn, self.function = norm, function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.bn(x))


def applied(y: Tensor) -> Tensor:
    return y * SCALE.view(-1, *[1] * (y.dim() - 2)) + SHIFT.view(-1, *[1] * (y.dim() - 2))


def layers(argument: float, *names: str) -> dict[str, tuple[int, nn.Module]]:
    return {f"{name}{n}d": (n, getattr(nn, f"{name}{n}d")(argument)) for name in names for n in (1, 2, 3)}


COMMUTING: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    **layers(2, "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"),
    **layers(0.5, "Dropout"),
    "padded MaxPool2d": (2, nn.MaxPool2d(3, 2, 1)),
    "AvgPool2d that counts no padding": (2, nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "AvgPool1d that counts no padding": (1, nn.AvgPool1d(3, 2, 1, count_include_pad=False)),
    "Identity": (2, nn.Identity()),
    "Dropout": (2, nn.Dropout()),
    "Flatten": (2, nn.Flatten()),
    **{
        f"{name}{n}d": (n, lambda y, name=name, n=n: getattr(F, f"{name}{n}d")(y, 2))
        for name in ("max_pool", "avg_pool", "adaptive_avg_pool")
        for n in (1, 2, 3)
    },
    "padded max_pool2d": (2, lambda y: F.max_pool2d(y, 3, 2, 1)),
    "avg_pool2d that counts no padding": (2, lambda y: F.avg_pool2d(y, 3, 2, 1, False, False)),
    "avg_pool2d of no padding": (2, lambda y: F.avg_pool2d(y, 2, padding=(0, 0))),
    **{
        name: (2, lambda y, name=name: getattr(F, name)(y, training=False))
        for name in ("dropout", "dropout2d", "dropout3d")
    },
    "dropout1d": (1, lambda y: F.dropout1d(y, training=False)),
    "feature_dropout": (2, lambda y: torch.feature_dropout(y, 0.5, False)),
    "contiguous": (2, lambda y: y.contiguous()),
    "flatten": (2, lambda y: y.flatten(1)),
    "view": (2, lambda y: y.view(y.size(0), -1)),
    "mean": (2, lambda y: y.mean((2, 3))),
    "mean from the end": (2, lambda y: y.mean((-1, -2), keepdim=True)),
    "mean over rows": (2, lambda y: y.mean(2, keepdim=True)),
    "mean of a sequence": (1, lambda y: torch.mean(y, dim=2)),
}
PADDED: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "AvgPool2d": (2, nn.AvgPool2d(3, 2, 1)),
    "AvgPool1d": (1, nn.AvgPool1d(3, 2, 1)),
    "avg_pool2d": (2, lambda y: F.avg_pool2d(y, 3, 2, 1)),
    "avg_pool3d": (3, lambda y: F.avg_pool3d(y, 3, stride=2, padding=(1, 0, 0))),
}
OTHERS: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "MaxPool2d with indices": (2, nn.MaxPool2d(2, return_indices=True)),
    "AvgPool2d with a divisor": (2, nn.AvgPool2d(2, divisor_override=3)),
    "avg_pool2d with a divisor": (2, lambda y: F.avg_pool2d(y, 2, divisor_override=3)),
    "LPPool2d": (2, nn.LPPool2d(2, 2)),
    "Flatten of pixels": (2, nn.Flatten(2)),
    "mean over channels": (2, lambda y: y.mean(1)),
    "mean over channels that stay": (2, lambda y: y.mean(1, keepdim=True)),
    "mean over rows that go": (2, lambda y: y.mean(2)),
    "mean of all": (2, lambda y: y.mean()),
    "adaptive_max_pool2d with indices": (2, lambda y: F.adaptive_max_pool2d(y, 2, return_indices=True)),
    "softmax": (2, lambda y: y.softmax(1)),
    "sum": (2, lambda y: y.sum((2, 3))),
    "zero pad": (2, lambda y: F.pad(y, (1, 1))),
    "sigmoid": (2, nn.Sigmoid()),
    "norm": (2, nn.GroupNorm(2, 6)),
}


def example(n: int) -> Tensor:
    """[2, 6, *] with `n` spatial axes."""
    return X[(..., *[0] * (3 - n))]


def reader(n: int, function: Callable[[Tensor], Any]) -> tuple[fx.GraphModule, fx.Node, fx.Node]:
    """The graph, the value that is read, and what reads it."""
    gm, _, _ = trace_module(Reader(NORMS[n](6), function).eval())
    infer_ranks(gm, Inputs((example(n),)))
    value = next(node for node in gm.graph.nodes if node.target == "bn")
    return gm, value, next(user for user in value.users if not reads_shape(user))


@pytest.mark.parametrize("name", COMMUTING)
@torch.no_grad()
def test_what_commutes_is_the_same_before_and_behind(name: str) -> None:
    n, function = COMMUTING[name]
    gm, value, user = reader(n, function)
    assert all(commutes(gm, user, value, through_padding=padding) for padding in (True, False))
    y = example(n)
    layer = function.eval() if isinstance(function, nn.Module) else function
    behind = layer(y)
    repeats = behind.shape[1] // 6  # above 1 behind a flatten
    shape = (-1, *[1] * (behind.dim() - 2))
    scale, shift = (values.repeat_interleave(repeats).view(shape) for values in (SCALE, SHIFT))
    assert_same_outputs(layer(applied(y)), behind * scale + shift)


@pytest.mark.parametrize("name", PADDED)
def test_an_average_of_zeros_commutes_only_if_they_stand_before_the_affine(name: str) -> None:
    gm, value, user = reader(*PADDED[name])
    assert commutes(gm, user, value, through_padding=True)
    assert not commutes(gm, user, value, through_padding=False)


@pytest.mark.parametrize("name", OTHERS)
def test_the_others_do_not(name: str) -> None:
    gm, value, user = reader(*OTHERS[name])
    assert not any(commutes(gm, user, value, through_padding=padding) for padding in (True, False))


FLATTENS: dict[str, tuple[bool, Callable[[Any, Tensor], Any]]] = {
    "flatten(1)": (True, lambda m, x: x.flatten(1)),
    "keyword": (True, lambda m, x: torch.flatten(x, start_dim=1)),
    "flatten": (False, lambda m, x: x.flatten()),
    "flatten(1, 2)": (False, lambda m, x: x.flatten(1, 2)),
    "size(0)": (True, lambda m, x: x.view(x.size(0), -1)),
    "shape[0]": (True, lambda m, x: x.reshape((x.shape[0], -1))),
    "size()[0]": (True, lambda m, x: x.view(x.size()[0], -1)),
    "size(1)": (False, lambda m, x: x.view(x.size(1), -1)),
    "the batch of what it is computed from": (True, lambda m, x: m.conv(x).view(x.size(0), -1)),
    "of other samples": (False, lambda m, x: x.view(x.view(4, 2, 6, 6).size(0), -1)),
    "a number": (False, lambda m, x: x.view(2, -1)),
    "a number of features": (False, lambda m, x: x.view(x.size(0), 144)),
}


@pytest.mark.parametrize("name", FLATTENS)
def test_what_makes_features_of_channels(name: str) -> None:
    flattens, function = FLATTENS[name]
    gm, result = inferred(Function(function).eval(), EXAMPLE)
    assert commutes(gm, result, result.all_input_nodes[0], through_padding=False) is flattens


@pytest.mark.parametrize("options", [(1, -1), (2, -1), (0, -1), (1, 2)])
def test_which_layers_make_features_of_channels(options: tuple[int, int]) -> None:
    gm, result = inferred(Function(lambda m, x: m.layer(x), nn.Flatten(*options)).eval(), EXAMPLE)
    found = commutes(gm, result, result.all_input_nodes[0], through_padding=False)
    assert found is (options == (1, -1))
