"""Ranks that are known are those of a run, operator by operator; what may be of any rank is unknown."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pn_compiler.graph.ranks import rank
from pn_compiler.nn import ChannelAffine, ConstantAffine, ConstantClamp, ProxyNormAct
from tests.graph.test_ranks import Function, X, inferred


class Ranks(fx.Interpreter):
    """Compares what is noted of every node with its value."""

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, Tensor):
            assert rank(node) in (value.dim(), None), node.format_node()
        return value


def check(
    function: Callable[[Any, Tensor], Any], x: Tensor = X, layer: nn.Module | None = None
) -> int | None:
    """The rank that is noted of the result; it, and those on the way, are not wrong."""
    gm, result = inferred(Function(function, layer).eval(), x)
    with torch.no_grad():
        Ranks(gm).run(x)
    return rank(result)


def sequence(x: Tensor) -> Tensor:
    return x.flatten(2)


def volume(x: Tensor) -> Tensor:
    return x[:, :, None]


POOLS: dict[str, Callable[[Any, Tensor], Any]] = {
    f"{kind}{n}d": lambda m, x, kind=kind, n=n, view=view: getattr(F, f"{kind}{n}d")(view(x), 1)
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool")
    for n, view in ((1, sequence), (2, lambda x: x), (3, volume))
}
ARITHMETIC: dict[str, Callable[[Any, Tensor], Any]] = {
    "add": lambda m, x: x + x.mean(1, keepdim=True),
    "a number": lambda m, x: 2 * x + 1,
    "one of fewer dimensions": lambda m, x: m.vector + x,
    "a size": lambda m, x: x * x.size(0),
    "sub": lambda m, x: torch.sub(x, x),
    "multiply": lambda m, x: torch.multiply(x, x),
    "mul": lambda m, x: x.mul(m.vector),
    "div": lambda m, x: torch.div(x, 2),
    "truediv": lambda m, x: 1 / x,
    "maximum": lambda m, x: torch.maximum(x, m.vector),
    "minimum": lambda m, x: torch.minimum(x, x),
    "add_": lambda m, x: (x + 1).add_(1),
    "in place": lambda m, x: operator.itruediv(
        operator.isub(operator.imul(operator.iadd(x + 1, 1), 2), x), 2
    ),
    "power": lambda m, x: x**2,
    "negation": lambda m, x: -x,
    "comparison": lambda m, x: x > 0,
    "and": lambda m, x: (x > 0) & (x < 1),
}
CONVOLUTIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "conv1d": lambda m, x: F.conv1d(sequence(x), m.weight[..., 0]),
    "conv2d": lambda m, x: F.conv2d(x, m.weight),
    "conv3d": lambda m, x: F.conv3d(volume(x), m.weight[..., None]),
    "conv_transpose1d": lambda m, x: F.conv_transpose1d(sequence(x), m.weight[..., 0]),
    "conv_transpose2d": lambda m, x: F.conv_transpose2d(x, m.weight),
    "conv_transpose3d": lambda m, x: F.conv_transpose3d(volume(x), m.weight[..., None]),
    "one sample": lambda m, x: F.conv2d(x[0], m.weight),
}
KEEPING: dict[str, Callable[[Any, Tensor], Any]] = {
    "dropouts": lambda m, x: F.dropout3d(F.dropout2d(F.dropout(x, training=False), training=False)[:, None])[
        :, 0
    ],
    "more dropouts": lambda m, x: torch.feature_dropout(F.dropout1d(sequence(x)), 0.5, False),
    "alpha_dropout": lambda m, x: F.alpha_dropout(x, training=False),
    "casts": lambda m, x: x.half().float().double().to(torch.float32).type_as(x),
    "copies": lambda m, x: x.clone().contiguous().detach(),
    "norms": lambda m, x: F.layer_norm(F.instance_norm(F.group_norm(x, 2)), (6,)),
    "batch_norm": lambda m, x: F.batch_norm(x, None, None, training=True),
    "softmax": lambda m, x: F.log_softmax(F.softmax(x, 1), 1),
    "turns": lambda m, x: x.flip(1).roll(1, 2).narrow(1, 0, 2).index_select(1, m.index),
    "permutations": lambda m, x: x.permute(0, 2, 3, 1).transpose(1, 2).swapaxes(1, 2).swapdims(1, 3),
    "moved axes": lambda m, x: torch.moveaxis(torch.movedim(x, 1, 2), 2, 1),
    "linear": lambda m, x: F.linear(x, m.linear.weight),
    "pixels": lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "sizes": lambda m, x: F.interpolate(F.pad(x, (1, 1)), scale_factor=2),
    "activations": lambda m, x: F.gelu(x.sigmoid().clamp(0, 1)),
}
SHAPING: dict[str, Callable[[Any, Tensor], Any]] = {
    "cat": lambda m, x: torch.cat([x, x], 1),
    "view": lambda m, x: x.view(2, 4, -1),
    "view of a tuple": lambda m, x: x.reshape((x.size(0), -1)),
    "expand": lambda m, x: m.vector.expand(3, 2, 6),
    "view_as": lambda m, x: x.flatten(1).view_as(x),
    "reshape_as": lambda m, x: x.flatten().reshape_as(x),
    "expand_as": lambda m, x: m.vector.expand_as(x),
    "flatten": lambda m, x: x.flatten(),
    "flatten some": lambda m, x: torch.flatten(x, 1, 2),
    "flatten from the end": lambda m, x: x.flatten(-2),
    "unsqueeze": lambda m, x: x.unsqueeze(1),
    "select": lambda m, x: x.select(1, 0),
    "mean": lambda m, x: x.mean((2, 3)),
    "mean that keeps": lambda m, x: x.mean(-1, keepdim=True),
    "item": lambda m, x: x[0],
    "items": lambda m, x: x[:, 0, None, ..., 1:],
    "a piece of a chunk": lambda m, x: x.chunk(2, 1)[1],
    "a piece of a split": lambda m, x: torch.split(x, [1, 3], 1)[0],
    "a piece of split_with_sizes": lambda m, x: x.split_with_sizes([1, 3], 1)[0],
    "a piece of tensor_split": lambda m, x: x.tensor_split(2, 1)[0],
    "a parameter": lambda m, x: m.weight,
}
TABLES = {
    f"{table}: {name}": function
    for table, functions in {
        "arithmetic": ARITHMETIC, "pools": POOLS, "convolutions": CONVOLUTIONS, "keeping": KEEPING,
        "shaping": SHAPING,
    }.items()
    for name, function in functions.items()
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_ranks_of_functions_are_known(name: str) -> None:
    assert check(TABLES[name]) is not None


UNKNOWN: dict[str, Callable[[Any, Tensor], Any]] = {
    "squeeze": lambda m, x: x.squeeze(),
    "stack": lambda m, x: torch.stack([x, x]),
    "einsum": lambda m, x: torch.einsum("nchw,nchw->nc", x, x),
    "matmul": lambda m, x: x @ m.vector,
    "sum": lambda m, x: x.sum(1),
    "a list of indices": lambda m, x: x[:, [0, 1]],
    "a mask": lambda m, x: x[x > 0],
    "unbind": lambda m, x: x.unbind(1)[0],
    "unfold": lambda m, x: x.unfold(2, 2, 1),
    "arithmetic with it": lambda m, x: x.squeeze() + 1,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_may_be_of_any_rank_is_unknown(name: str) -> None:
    assert check(UNKNOWN[name]) is None


ONE = torch.ones(4)
MODULES: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
    (nn.Linear(6, 3), lambda x: x),
    (nn.Flatten(), lambda x: x),
    (nn.Flatten(2), lambda x: x),
    *(
        (cls(4), view)
        for n, view in ((1, sequence), (2, lambda x: x), (3, volume))
        for cls in (getattr(nn, f"BatchNorm{n}d"), getattr(nn, f"InstanceNorm{n}d"))
    ),
    *(
        (getattr(nn, f"{kind}{n}d")(1), view)
        for n, view in ((1, sequence), (2, lambda x: x), (3, volume))
        for kind in (
            "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "ReflectionPad", "ReplicationPad",
            "CircularPad", "ZeroPad",
        )
        if (kind, n) != ("ReflectionPad", 3)
    ),
    *(
        (getattr(nn, f"Conv{kind}{n}d")(4, 3, 1), view)
        for n, view in ((1, sequence), (2, lambda x: x), (3, volume))
        for kind in ("", "Transpose")
    ),
    *((layer, lambda x: x) for layer in (
        nn.GroupNorm(2, 4), nn.LayerNorm(6), nn.Identity(), nn.Upsample(scale_factor=2), nn.PixelShuffle(2),
        nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Softmax(1), nn.Dropout(), nn.Dropout2d(),
        nn.ConstantPad2d(1, 0.0), nn.SiLU(), nn.PReLU(4), ProxyNormAct(1, 4, nn.ReLU()),
        ConstantAffine(ONE, ONE), ConstantClamp(ONE, ONE),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "view"), MODULES, ids=lambda value: type(value).__name__)
def test_ranks_of_layers_are_known(layer: nn.Module, view: Callable[[Tensor], Tensor]) -> None:
    assert check(lambda m, x: m.layer(view(x)), layer=layer) is not None


def test_the_results_of_a_site_are_maps_and_vectors() -> None:
    class Site(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            outputs = ("activation", "scale", "shift", "affine")
            self.site, self.apply_affine = ProxyNormAct(1, 4, nn.SiLU(), outputs=outputs), ChannelAffine()

        def forward(self, x: Tensor) -> Any:
            found = self.site(x)
            parts = found[0], found[1], found[2], found[3]
            return *parts, self.apply_affine(*parts[:3])

    gm, found = inferred(Site().eval(), X)
    Ranks(gm).run(X)
    assert [rank(node) for node in found] == [4, 1, 1, 4, 4]
