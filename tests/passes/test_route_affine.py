"""Scale and shift of a site: into what is linear, before everything else, by hand in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.nn import ChannelAffine, InputAffineConv2d, InputAffineLinear, ProxyNormAct
from pn_compiler.passes.route_affine import RouteAffine
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests.passes.graphs import (
    BY_HAND,
    SiteNet,
    activation_by_hand,
    by_hand,
    called,
    per_channel,
    randomize_proxies,
    run,
    scale_and_shift_by_hand,
    site_by_hand,
    traced,
    untouched,
)

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
X = IMAGES.double()


def gate(m: Any, z: Tensor) -> Tensor:
    return z * m.squeeze(z.mean((2, 3), keepdim=True)).sigmoid()


def tokens(m: Any, z: Tensor) -> Tensor:
    return m.conv(z).sum() + m.linear(z.flatten(2).transpose(1, 2)).sum(1)


CONV = InputAffineConv2d
#: name -> (the layers that read scale and shift, the ChannelAffines that apply them), and the function
ROUTED: dict[str, tuple[list[type[nn.Module]], int, Callable[[Any, Tensor], Any]]] = {
    "a convolution": ([CONV], 0, lambda m, z: m.conv(z)),
    "groups": ([CONV], 0, lambda m, z: m.depthwise(z)),
    "behind a pool": ([CONV], 0, lambda m, z: m.conv(F.max_pool2d(z, 2))),
    "two readers": ([CONV, CONV], 0, lambda m, z: m.conv(z).mean() + m.depthwise(F.avg_pool2d(z, 2))),
    "a linear layer": ([InputAffineLinear], 0, lambda m, z: m.linear(z.mean((2, 3)))),
    "flattened": ([InputAffineLinear], 0, lambda m, z: m.flat(F.max_pool2d(z, 2).flatten(1))),
    "an addition beside": ([CONV], 1, lambda m, z: m.conv(z).mean() + z),
    "two additions share one": ([CONV], 1, lambda m, z: (m.conv(z), z + 1, z - 2)),
    "one behind a pool": ([CONV], 2, lambda m, z: (m.conv(z), z + 1, F.max_pool2d(z, 2) + 1)),
    "a gate": ([CONV], 1, gate),
    "a shape": ([CONV], 0, lambda m, z: m.conv(z) * z.size(0)),
    "tokens": ([CONV], 1, tokens),
    "the output": ([CONV], 1, lambda m, z: (m.conv(z), z)),
}


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU()], ids=str)
@pytest.mark.parametrize("name", ROUTED)
@torch.no_grad()
def test_linear_layers_absorb_and_the_others_get_it_applied(name: str, activation: nn.Module) -> None:
    layers, affines, function = ROUTED[name]
    model = SiteNet(function, activation).double().eval()
    for through_padding in (True, False):
        gm = traced(model, X)
        graph_pass = RouteAffine(through_padding=through_padding)
        assert graph_pass.preserves_outputs is not through_padding
        assert run(graph_pass, gm).rewritten == 1
        found = [cls for cls in called(gm) if cls in (InputAffineConv2d, InputAffineLinear)]
        assert found == layers
        assert called(gm).count(ChannelAffine) == affines
        assert_same_outputs(gm(X), by_hand(model, X), tolerance=BY_HAND)
        assert set(gm.state_dict()) <= set(model.state_dict())


@torch.no_grad()
def test_zeros_are_padded_before_the_affine_if_asked_for() -> None:
    def shifted(m: Any, z: Tensor) -> Tensor:
        _, shift = scale_and_shift_by_hand(m.site, F.silu)
        padded = per_channel(shift, z).expand(len(z), 3, 10, 10).clone()
        padded[..., 1:-1, 1:-1] = z
        return F.conv2d(padded, m.padded.weight, m.padded.bias)

    model = SiteNet(lambda m, z: m.padded(z)).double().eval()
    gm = traced(model, X)
    untouched(RouteAffine(through_padding=False), gm)
    assert run(RouteAffine(through_padding=True), gm).rewritten == 1
    assert_same_outputs(gm(X), shifted(model, site_by_hand(X, model.site, F.silu)), tolerance=BY_HAND)


LEFT: dict[str, Callable[[Any, Tensor], Any]] = {
    "nothing absorbs": lambda m, z: z + 1,
    "the output": lambda m, z: z,
    "an activation between": lambda m, z: m.conv(torch.tanh(z)),
    "a linear layer over pixels": lambda m, z: m.linear(z[..., :3]),
    "a convolution that is called twice": lambda m, z: m.conv(z) + m.conv(z.flip(1)),
    "a weight that is read elsewhere": lambda m, z: m.conv(z) * m.conv.weight.sum(),
    "another number of channels": lambda m, z: m.conv(z[:, [0, 1, 2]]),
}


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_without_a_consumer_the_site_stays_whole(name: str) -> None:
    model = SiteNet(LEFT[name]).double().eval()
    gm = traced(model, X)
    untouched(RouteAffine(through_padding=True), gm)
    assert_same_outputs(gm(X), by_hand(model, X), tolerance=BY_HAND)


@torch.no_grad()
def test_a_value_that_is_overwritten_is_given_whole_to_all_readers() -> None:
    def overwrites(m: Any, z: Tensor) -> Tensor:
        pooled = F.max_pool2d(z, 2)
        pooled[:, :1].mul_(2.0)
        return m.conv(z).mean() + m.depthwise(pooled)

    model = SiteNet(overwrites).double().eval()
    gm = traced(model, X)
    assert run(RouteAffine(through_padding=False), gm).rewritten == 1
    assert [cls for cls in called(gm) if cls is not nn.Conv2d] == [ProxyNormAct, ChannelAffine, CONV]
    assert_same_outputs(gm(X), by_hand(model, X), tolerance=BY_HAND)


@torch.no_grad()
def test_a_site_called_twice_is_routed_at_both_calls() -> None:
    class Twice(SiteNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.site(x)).mean(1, keepdim=True) + self.depthwise(self.site(2 * x + 1)).mean()

    model = Twice(lambda m, z: z).double().eval()
    gm = traced(model, X)
    assert run(RouteAffine(through_padding=False), gm).rewritten == 1
    first, second = (site_by_hand(x, model.site, F.silu) for x in (X, 2 * X + 1))
    expected = model.conv(first).mean(1, keepdim=True) + model.depthwise(second).mean()
    assert_same_outputs(gm(X), expected, tolerance=BY_HAND)


@torch.no_grad()
def test_a_reader_of_the_affine_keeps_it() -> None:
    class Both(SiteNet):
        def forward(self, x: Tensor) -> Tensor:
            z, y = self.site(x)
            return self.conv(z).mean() + y

    for activation in (nn.SiLU(), nn.ReLU()):
        model = Both(lambda m, z: z, activation).double().eval()
        model.site.outputs = ("output", "affine")
        gm = traced(model, X)
        assert run(RouteAffine(through_padding=False), gm).rewritten == 1
        y = activation_by_hand(X, model.site, lambda u: u)
        expected = model.conv(site_by_hand(X, model.site, copy.deepcopy(activation))).mean() + y
        assert_same_outputs(gm(X), expected, tolerance=BY_HAND)


class TwoReaders(nn.Module):
    """The activation and a convolution both read the BatchNorm."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.act = activation
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return self.conv1(self.act(y)) * self.conv2(y)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU()], ids=str)
@pytest.mark.parametrize("options", [{}, {"proxy_padding": "output"}, {"warm_start": "none"}], ids=str)
def test_other_readers_keep_the_affine_output(activation: nn.Module, options: dict[str, str]) -> None:
    net = randomize_batch_norms(TwoReaders(activation)).eval().double()
    x = IMAGES.double()
    converted = pn_compiler.transform(net, **options)
    (site,) = pn_compiler.sites(converted)
    assert site.kind == "pn"
    assert_same_outputs(pn_compiler.fold(converted)(x), converted(x), tolerance=1e-9)
    if not options:
        assert_same_outputs(converted(x), pn_compiler.transform(net, proxy=False)(x), tolerance=1e-9)


class Residual(nn.Module):
    """bn - act feeds a convolution and an addition, the first site of a ResNet v1."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.act = activation
        self.pool = nn.MaxPool2d(2)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.act(self.bn(x)))
        return y + self.conv(y)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.LeakyReLU()], ids=str)
@pytest.mark.parametrize("proxy_padding", ["activation", "output"])
def test_a_consumer_that_cannot_absorb(activation: nn.Module, proxy_padding: str) -> None:
    net = randomize_batch_norms(Residual(activation)).eval()
    (site,) = pn_compiler.sites(pn_compiler.transform(net, proxy_padding=proxy_padding))
    assert (site.kind, site.code) == ("norm_only", "PN202")
    assert "add" in site.reason
    scratch = pn_compiler.transform(net, warm_start="none", proxy_padding=proxy_padding).double()
    (site,) = pn_compiler.sites(scratch)
    assert site.kind == "pn"
    randomize_proxies(scratch)
    x = IMAGES.double()
    assert_same_outputs(pn_compiler.fold(scratch)(x), scratch(x), tolerance=1e-9)
    assert_same_outputs(scratch(x), residual_reference(scratch, x, proxy_padding), tolerance=1e-9)


def residual_reference(model: nn.Module, x: Tensor, proxy_padding: str) -> Tensor:
    """`Residual` with proxy normalization, by hand."""
    site = copy.deepcopy(model.get_submodule("bn"))
    assert isinstance(site, pn_compiler.nn.ProxyNormAct)
    site.outputs = ("output",)
    conv = model.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    z = F.max_pool2d(site(x), 2)
    padded = F.pad(z, (1, 1, 1, 1))
    if proxy_padding == "activation":  # a padded pixel is an activation of 0, which is v after the affine
        _, shift = site.scale_and_shift()
        inside = F.pad(torch.ones_like(z), (1, 1, 1, 1))
        padded = padded + (1 - inside) * shift.view(-1, 1, 1)
    return z + F.conv2d(padded, conv.weight, conv.bias)
