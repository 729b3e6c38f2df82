"""ProxyNormAct and the consumers of its affine, against formulas written out in float64."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError
from pn_compiler.nn import (
    AnchoredNorm,
    InputAffineConv1d,
    InputAffineConv2d,
    InputAffineConv3d,
    InputAffineLinear,
    ProxyNormAct,
    answer_batch_norm,
)
from pn_compiler.testing import assert_batch_independent, assert_same_outputs

# phi, written with other functions of torch than the product's, and where it bends
FORMULAS = {
    "relu": (nn.ReLU(), lambda u: torch.where(u > 0, u, torch.zeros_like(u)), [0.0]),
    "relu6": (nn.ReLU6(), lambda u: u.clamp(0, 6), [0.0, 6.0]),
    "leaky_relu": (nn.LeakyReLU(0.1), lambda u: torch.where(u > 0, u, 0.1 * u), [0.0]),
    "silu": (nn.SiLU(), lambda u: u / (1 + torch.exp(-u)), []),
    "gelu": (nn.GELU(), lambda u: u * 0.5 * (1 + torch.erf(u / math.sqrt(2))), []),
}


def reference(x: Tensor, site: ProxyNormAct, name: str, groups: int) -> Tensor:
    """Proxy normalization from its definition."""
    _, phi, bends = FORMULAS[name]
    n, c = x.shape[:2]
    y = x.reshape(n, groups, -1)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, unbiased=False, keepdim=True) + site.eps).sqrt()
    y = y.reshape(x.shape)
    with torch.no_grad():  # where the density of the proxy variable meets a bend of phi
        p = [(bend - site.bias) / site.weight for bend in bends]
        t, mass = gauss_legendre([(v - site.proxy_bias) / (1 + site.proxy_weight) for v in p], c)
    u = site.weight[:, None] * (site.proxy_bias[:, None] + (1 + site.proxy_weight[:, None]) * t)
    values = phi(u + site.bias[:, None])
    mean = (values * mass).sum(1)
    var = (values**2 * mass).sum(1) - mean**2
    column = (1, c) + (1,) * (x.dim() - 2)
    a = phi(site.weight.view(column) * y + site.bias.view(column))
    return (a - mean.view(column)) / (var + site.proxy_eps).sqrt().view(column)


def gauss_legendre(bends: list[Tensor], channels: int) -> tuple[Tensor, Tensor]:
    """Nodes and masses of the standard normal, [C, nodes]: 20 on each of 400 slices, split at `bends`."""
    nodes, weights = (torch.tensor(v) for v in special.roots_legendre(20))
    even = torch.linspace(-9, 9, 401, dtype=torch.float64).expand(channels, -1)
    edges = torch.cat([even, *(b.clamp(-9, 9)[:, None] for b in bends)], 1).sort(1).values
    half = (edges[:, 1:] - edges[:, :-1])[..., None] / 2
    t = (edges[:, :-1, None] + half * (1 + nodes)).flatten(1)
    return t, (half * weights).flatten(1) * torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)


def randomized(site: ProxyNormAct, seed: int = 0) -> ProxyNormAct:
    torch.manual_seed(seed)
    for parameter in site.parameters():
        nn.init.normal_(parameter, 0, 0.4)
    with torch.no_grad():
        site.weight += 1
    return site.double()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_values_and_gradients_agree_with_the_definition(name: str, groups: int) -> None:
    site = randomized(ProxyNormAct(groups, 6, FORMULAS[name][0]))
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    seed = torch.randn_like(x)
    leaves = [x, site.weight, site.bias, site.proxy_weight, site.proxy_bias]
    got, want = site(x), reference(x, site, name, groups)
    assert (got - want).abs().max() < 1e-6
    for g, w in zip(
        torch.autograd.grad((got * seed).sum(), leaves),
        torch.autograd.grad((want * seed).sum(), leaves),
        strict=True,
    ):
        assert (g - w).abs().max() < 1e-6 * max(1.0, float(w.abs().max()))


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (3, 6, 5, 4), (2, 6, 3, 4, 5)])
def test_every_rank_and_batch_independence(shape: tuple[int, ...]) -> None:
    site = randomized(ProxyNormAct(2, 6, nn.ReLU()))
    x = torch.randn(shape, dtype=torch.float64)
    assert_same_outputs(site(x), reference(x, site, "relu", 2), tolerance=1e-10)
    assert_batch_independent(site, x)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()])
@pytest.mark.parametrize("affine", [False, True])
def test_outputs_in_parts_make_up_the_whole(activation: nn.Module, affine: bool) -> None:
    site = randomized(ProxyNormAct(1, 4, activation))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    z = site(x)
    site.outputs = ("activation", "scale", "shift", "affine") if affine else ("activation", "scale", "shift")
    a, scale, shift, *rest = site(x)
    assert (scale is None) == site.scales_affine
    whole = a * (1 if scale is None else scale.view(-1, 1, 1)) + shift.view(-1, 1, 1)
    assert_same_outputs(whole, z)
    if affine:
        y = F.group_norm(x, 1, site.weight, site.bias, site.eps)
        assert_same_outputs(rest[0], y)


def test_constant_input_and_zero_weight_stay_finite() -> None:
    site = ProxyNormAct(1, 4, nn.ReLU())
    nn.init.zeros_(site.weight)
    x = torch.ones(2, 4, 3, 3, requires_grad=True)
    out = site(x)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in site.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    site = randomized(ProxyNormAct(1, 8, nn.SiLU())).float()
    x = torch.randn(2, 8, 6, 6)
    want = site(x)
    got = site.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert_same_outputs(got, want)


def test_nan_is_not_hidden() -> None:
    x = torch.randn(2, 4, 3, 3)
    x[0, 0, 0, 0] = float("nan")
    out = ProxyNormAct(1, 4, nn.ReLU())(x)
    assert out[0].isnan().any()
    assert not out[1].isnan().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4, nn.ReLU()), "does not divide"),
        ((0, 4, nn.ReLU()), "does not divide"),
    ],
)
def test_refuses_groups_that_do_not_divide(arguments: tuple[int, int, nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProxyNormAct(*arguments)


def test_refuses_unknown_outputs() -> None:
    with pytest.raises(ConfigError, match="outputs"):
        ProxyNormAct(1, 4, nn.ReLU(), outputs=("everything",))  # type: ignore[arg-type]


CONVS = {1: InputAffineConv1d, 2: InputAffineConv2d, 3: InputAffineConv3d}
PADS = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@settings(max_examples=40, deadline=None)
@given(
    spatial=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    padding=st.integers(0, 2),
    stride=st.integers(1, 2),
    mode=st.sampled_from(sorted(PADS)),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_convolution_takes_the_affine_in_behind_its_padding(
    spatial: int, groups: int, padding: int, stride: int, mode: str, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    conv = CONVS[spatial](
        4, 8, 3, stride, padding, groups=groups, bias=bias, padding_mode=mode, dtype=torch.float64
    )
    x = torch.randn(2, 4, *[6] * spatial, dtype=torch.float64)
    scale, shift = torch.rand(4, dtype=torch.float64) + 0.5, torch.randn(4, dtype=torch.float64)
    column = (-1,) + (1,) * spatial
    padded = F.pad(x, (padding, padding) * spatial, PADS[mode]) * scale.view(column) + shift.view(column)
    plain = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    want = plain(padded, conv.weight, conv.bias, stride, groups=groups)
    assert_same_outputs(conv(x, scale, shift), want)
    assert_same_outputs(conv(x), conv._conv_forward(x, conv.weight, conv.bias))


@pytest.mark.parametrize("samples", [1, 40])  # smaller than the weight, and larger
@pytest.mark.parametrize("absorbed", ["both", "shift", "scale"])
@pytest.mark.parametrize("padding", [0, 1])
def test_gradients_of_consumers_whatever_is_scaled(padding: int, absorbed: str, samples: int) -> None:
    torch.manual_seed(0)
    conv = InputAffineConv1d(6, 16, 1, padding=padding, groups=2, dtype=torch.float64)
    x = torch.randn(samples, 6, 4, dtype=torch.float64, requires_grad=True)
    assert (x.numel() < conv.weight.numel()) == (samples == 1)
    scale, shift = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    padded = F.pad(x, (padding, padding))
    if absorbed != "shift":
        padded = padded * scale[:, None]
    if absorbed != "scale":
        padded = padded + shift[:, None]
    want = F.conv1d(padded, conv.weight, conv.bias, groups=2)
    got = conv(x, None if absorbed == "shift" else scale, None if absorbed == "scale" else shift)
    assert_same_outputs(got, want)
    inputs = [
        x,
        conv.weight,
        conv.bias,
        *({"shift": [shift], "scale": [scale]}.get(absorbed, [scale, shift])),
    ]
    expected = torch.autograd.grad(want.square().sum(), inputs)
    for actual, gradient in zip(torch.autograd.grad(got.square().sum(), inputs), expected, strict=True):
        assert_same_outputs(actual, gradient)


@pytest.mark.parametrize("repeats", [1, 6])
def test_linear_takes_the_affine_in_behind_a_flatten(repeats: int) -> None:
    layer = InputAffineLinear(4 * repeats, 5, dtype=torch.float64)
    x = torch.randn(3, 4, repeats, dtype=torch.float64)
    scale, shift = torch.rand(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    want = F.linear((x * scale[:, None] + shift[:, None]).flatten(1), layer.weight, layer.bias)
    assert_same_outputs(layer(x.flatten(1), scale, shift), want)


def test_linear_refuses_inputs_that_it_was_not_converted_for() -> None:
    with pytest.raises(ConfigError, match=r"\[N, C\]"):
        InputAffineLinear(4, 5)(torch.randn(2, 3, 4), torch.ones(4), torch.ones(4))


def test_statistics_in_evaluation_follow_every_change_of_a_parameter() -> None:
    site = ProxyNormAct(1, 4, nn.SiLU()).eval()
    x = torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        for change in (
            lambda: site.weight.mul_(2),
            lambda: site.bias.data.add_(1),  # unseen by autograd's version counter
            lambda: site.load_state_dict({k: v + 0.5 for k, v in site.state_dict().items()}),
            site.double,
        ):
            before = site(x.to(site.weight.dtype))
            assert torch.equal(site(x.to(site.weight.dtype)), before)
            change()
            x = x.to(site.weight.dtype)
            fresh = copy.deepcopy(site).train()
            assert torch.equal(site(x), fresh(x))
    site(x).sum().backward()
    assert site.proxy_weight.grad is not None


def test_a_gate_takes_in_scale_and_shift() -> None:
    class SqueezeExcitation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.down, self.up = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
            self.pool, self.conv = nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(self.bn(x))
            return self.conv(torch.sigmoid(self.up(F.relu(self.down(self.pool(y))))) * y)

    net = SqueezeExcitation()
    converted = pn_compiler.transform(net, warm_start="none")
    assert "bn_gated" in dict(converted.named_modules())
    x = torch.randn(2, 4, 5, 5)
    z = ProxyNormAct(1, 4, nn.SiLU())(x)
    expected = net.conv(torch.sigmoid(net.up(F.relu(net.down(net.pool(z))))) * z)
    assert_same_outputs(converted(x), expected)
    assert_same_outputs(pn_compiler.fold(converted)(x), expected)


def test_an_activation_in_place_leaves_the_affine_output_alone() -> None:
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)

    class Net(nn.Module):
        def __init__(self, *, inplace: bool) -> None:
            super().__init__()
            act = nn.ReLU(inplace=inplace)
            self.site = ProxyNormAct(2, 4, act, outputs=("output", "affine"), dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            output, affine = self.site(x)
            return output + 2 * affine

    expected = Net(inplace=False)(x)
    for model in (Net(inplace=True), pn_compiler.fold(Net(inplace=True))):
        assert_same_outputs(model(x), expected)


def test_channels_last_behind_frozen_layers_trains() -> None:
    """torch's own backward of group_norm ends the process there."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    layers[0].requires_grad_(False)
    x = torch.randn(3, 3, 9, 9)
    converted = pn_compiler.transform(layers.train())
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = converted.to(memory_format=memory_format)
        model.zero_grad()
        model(x.to(memory_format=memory_format)).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def functional(norm: nn.GroupNorm | AnchoredNorm) -> tuple[Any, Tensor, Tensor]:
    """(the normalizer with other parameters, an input, and what it gives for that)."""
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    x = torch.randn(3, 4, 5)
    expected = norm(x)
    answer_batch_norm(norm, 0.2)
    return norm, x, expected


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), AnchoredNorm(2, 4)], ids=["group", "rms"])
def test_batch_norm_with_its_statistics_calls_the_normalizer(norm: nn.Module) -> None:
    norm, x, expected = functional(copy.deepcopy(norm))
    tensors = norm.running_mean, norm.running_var, norm.weight, norm.bias
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    results = (
        F.batch_norm(x, *tensors),  # statistics that are no tensors
        F.batch_norm(running_var=norm.running_var, running_mean=norm.running_mean, input=x, training=True),
        torch.batch_norm(x, *tensors[2:], *tensors[:2], False, norm.momentum, norm.eps, False),
    )
    assert all(torch.equal(result, expected) for result in results)
    assert [id(output) for output in seen] == [id(result) for result in results]
    assert norm.momentum == 0.2


def test_nothing_else_takes_its_statistics() -> None:
    norm, x, _ = functional(nn.GroupNorm(2, 4))
    other, _, _ = functional(nn.GroupNorm(2, 4))
    for wrong in (
        lambda: torch.sub(x[0, :, 0], norm.running_mean),
        lambda: torch.sqrt(norm.running_var),
        lambda: F.instance_norm(x, norm.running_mean, norm.running_var),
        lambda: torch.native_batch_norm(x, None, None, norm.running_mean, norm.running_var, False, 0.1, 1e-5),
        lambda: F.batch_norm(x, norm.running_mean, other.running_var),
    ):
        with pytest.raises(TypeError, match="only batch_norm takes them"):
            wrong()
