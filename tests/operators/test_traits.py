"""The table of traits, against what torch does."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pn_compiler.operators.traits import function_name, layer_name, traits_named

RANDOM = torch.Generator().manual_seed(0)
X = {n: torch.randn(2, 8, *[4] * n, dtype=torch.float64, generator=RANDOM) for n in (1, 2, 3)}

LAYERS: list[tuple[nn.Module, int]] = [
    *((getattr(nn, f"{kind}Pool{n}d")(2), n) for kind in ("Max", "Avg") for n in (1, 2, 3)),
    *((getattr(nn, f"Adaptive{kind}Pool{n}d")(2), n) for kind in ("Max", "Avg") for n in (1, 2, 3)),
    *((getattr(nn, f"{kind}Pad{n}d")(1), n) for kind in ("Reflection", "Replication") for n in (1, 2, 3)),
    *((getattr(nn, f"{kind}Pad{n}d")(1), n) for kind in ("Circular", "Zero") for n in (1, 2, 3)),
    *((getattr(nn, f"ConstantPad{n}d")(1, 0.5), n) for n in (1, 2, 3)),
    *((getattr(nn, f"Conv{kind}{n}d")(8, 6, 1).double(), n) for kind in ("", "Transpose") for n in (1, 2, 3)),
    *((getattr(nn, f"InstanceNorm{n}d")(8).double(), n) for n in (1, 2, 3)),
    (nn.Linear(4, 3).double(), 2),
    (nn.GroupNorm(2, 8).double(), 2),
    (nn.LayerNorm(4).double(), 2),
    (nn.Identity(), 2),
    *((cls().eval(), 2) for cls in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)),
    (nn.Upsample(scale_factor=2.0), 2),
    (nn.UpsamplingNearest2d(scale_factor=2), 2),
    (nn.UpsamplingBilinear2d(scale_factor=2), 2),
    (nn.PixelShuffle(2), 2),
    (nn.PixelUnshuffle(2), 2),
    (nn.ChannelShuffle(2), 2),
    (nn.Flatten(), 2),
    (nn.Unflatten(1, (2, 4)), 2),
    (nn.Softmax(1), 2),
    (nn.LogSoftmax(1), 2),
]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "alpha_dropout": F.alpha_dropout,
    "clone": torch.clone,
    "contiguous": lambda x: x.contiguous(),
    "detach": torch.detach,
    "exp": torch.exp,
    "feature_dropout": lambda x: torch.feature_dropout(x, 0.5, False),
    "flip": lambda x: x.flip(1),
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 2])),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "movedim": lambda x: x.movedim(1, 2),
    "moveaxis": lambda x: x.moveaxis(1, 2),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "neg": torch.neg,
    "pad": lambda x: F.pad(x, (1, 1)),
    "permute": lambda x: x.permute(1, 2, 3, 0),
    "reshape": lambda x: x.reshape(8, -1),
    "roll": lambda x: x.roll(1, 1),
    "rsqrt": lambda x: x.abs().rsqrt(),
    "softmax": lambda x: x.softmax(1),
    "sqrt": lambda x: x.abs().sqrt(),
    "square": torch.square,
    "squeeze": torch.squeeze,
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "swapdims": lambda x: x.swapdims(1, 2),
    "transpose": lambda x: x.transpose(0, 1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "view": lambda x: x.view(-1, 4),
    "float": torch.Tensor.float,
}


def check(name: str, operator: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """What the row of `name` says of `operator` is so, on x."""
    traits, y = traits_named(name), operator(x)
    assert traits != traits_named("none")
    if traits.rank is not None:
        assert y.dim() == x.dim()
    if traits.dtype is not None:
        assert y.is_floating_point()
    if traits.batch:
        torch.testing.assert_close(operator(x[1:]), y[1:], atol=1e-12, rtol=0)
    if traits.channels:
        assert y.shape[1] == x.shape[1]
    if traits.moves:
        assert y.numel() == x.numel()
        assert torch.equal(y.flatten().sort().values, x.flatten().sort().values)
    if traits.commutes or traits.resizes:
        scale, shift = torch.rand(8, dtype=x.dtype) + 0.5, torch.randn(8, dtype=x.dtype)
        scale, shift = (v.view(-1, *[1] * (x.dim() - 2)) for v in (scale, shift))
        torch.testing.assert_close(operator(x * scale + shift), y * scale + shift, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("layer", "n"), LAYERS, ids=[str(layer) for layer, _ in LAYERS])
def test_the_row_of_a_layer_is_true(layer: nn.Module, n: int) -> None:
    check(layer_name(type(layer)), layer, X[n])
    if (axes := traits_named(layer_name(type(layer))).axes) and "Pixel" not in str(layer):
        assert axes == n


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_row_of_a_function_is_true(name: str) -> None:
    check(name, FUNCTIONS[name], X[2])


def test_functions_and_layers_share_a_row() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for function, cls in (
        (torch.max_pool2d, nn.MaxPool2d),
        (F.avg_pool3d, nn.AvgPool3d),
        (F.adaptive_avg_pool1d, nn.AdaptiveAvgPool1d),
        (F.dropout2d, nn.Dropout2d),
        (F.conv1d, nn.Conv1d),
        (F.pixel_shuffle, nn.PixelShuffle),
        (torch.ops.aten.reflection_pad2d.default, nn.ReflectionPad2d),
    ):
        assert function_name(graph.call_function(function, (x, 2))) == layer_name(cls) != ""


def test_a_max_pool_with_indices_has_a_row_of_its_own() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert function_name(graph.call_function(torch.max_pool2d, (x, 2))) == "max_pool2d"
    assert function_name(graph.call_function(F.adaptive_max_pool1d, (x, 2, False))) == "adaptive_max_pool1d"
    both = (
        graph.call_function(F.max_pool2d, (x, 2), {"return_indices": True}),
        graph.call_function(F.max_pool2d, (x, 2, 2, 0, 1, False, True)),
        graph.call_function(torch.ops.aten.max_pool2d_with_indices.default, (x, [2, 2])),
        graph.call_function(torch.adaptive_max_pool1d, (x, 2)),
    )
    names = [function_name(node) for node in both]
    assert names == ["max_pool2d_with_indices"] * 3 + ["adaptive_max_pool1d_with_indices"]
    assert all(traits_named(name).pieces and not traits_named(name).commutes for name in names)


def test_a_forward_of_a_user_is_unknown() -> None:
    class Default(nn.MaxPool2d):
        def __init__(self) -> None:
            super().__init__(3, 2, 1)

    class Own(nn.MaxPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    class MaxPool2d(nn.Module):
        pass

    assert layer_name(Default) == "max_pool2d"
    assert layer_name(Own) == layer_name(MaxPool2d) == layer_name(nn.Module) == ""
