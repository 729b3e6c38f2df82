"""Proxy statistics become constants, in float64 equal to a site computed by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.base.errors import PostconditionError
from pn_compiler.nn import ConstantAffine, ConstantClamp
from pn_compiler.passes.fold.fold_proxy_norm import FoldProxyNorm
from pn_compiler.passes.route_affine import RouteAffine
from pn_compiler.testing import (
    assert_batch_independent,
    assert_same_outputs,
    count_modules,
    randomize_batch_norms,
)
from tests.passes.graphs import BY_HAND, SiteNet, by_hand, called, randomize_proxies, run, traced, untouched

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
X = IMAGES.double()
CLIPS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.Hardtanh(-0.5, 0.7),
    nn.Hardtanh(-0.5, float("inf")),
]
HOMOGENEOUS = [nn.LeakyReLU(0.2, inplace=True), nn.PReLU(), nn.PReLU(3)]
OTHERS = [
    nn.Hardswish(inplace=True),
    nn.SiLU(inplace=True),
    nn.GELU(),
    nn.Softplus(),
    nn.Threshold(0.2, 0.2),
    nn.Tanh(),
]


def routed(model: SiteNet) -> fx.GraphModule:
    gm = traced(model, X)
    RouteAffine(through_padding=False)(gm)
    return gm


@torch.no_grad()
def fold(model: SiteNet) -> fx.GraphModule:
    """The graph of `model`, routed and folded, which computes what `model` does by hand."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gm = routed(model)
    result = run(FoldProxyNorm(), gm)
    assert result.rewritten == 1
    assert {(note.code, note.site) for note in result.notes} == {("PN210", "site")}
    assert not set(called(gm)) - {nn.GroupNorm, type(model.site.activation), nn.Conv2d, nn.Linear, *CONSTANTS}
    assert_same_outputs(gm(X), by_hand(model, X), tolerance=BY_HAND)
    assert_batch_independent(gm, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return gm


CONSTANTS = (ConstantAffine, ConstantClamp)


@pytest.mark.parametrize("activation", [*CLIPS, *HOMOGENEOUS, *OTHERS], ids=str)
def test_a_whole_site_becomes_a_normalizer_an_activation_and_constants(activation: nn.Module) -> None:
    gm = fold(SiteNet(lambda m, z: z + 1, activation).double().eval())
    if activation in CLIPS:  # the clip takes the affine into its bounds
        assert called(gm) == [nn.GroupNorm, ConstantClamp]
        return
    assert called(gm) == [nn.GroupNorm, type(activation), ConstantAffine]
    constant = gm.get_submodule("site_constantaffine")
    assert (constant.scale is None) == (activation in HOMOGENEOUS)  # a scale is in the normalizer
    assert not getattr(gm.get_submodule(f"site_{type(activation).__name__.lower()}"), "inplace", False)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Hardswish(inplace=True)], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda m, z: m.conv(z),
        lambda m, z: m.depthwise(z),
        lambda m, z: m.linear(z.mean((2, 3))),
        lambda m, z: m.flat(F.max_pool2d(z, 2).flatten(1)),
    ],
)
def test_constants_go_into_the_layers_that_read_a_site(
    activation: nn.Module, function: Callable[[Any, Tensor], Any]
) -> None:
    gm = fold(SiteNet(function, activation).double().eval())
    assert called(gm)[:2] == [nn.GroupNorm, type(activation)]
    assert called(gm)[2] in (nn.Conv2d, nn.Linear)
    assert not count_modules(gm, *CONSTANTS)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()], ids=str)
def test_what_reads_the_full_value_gets_it_applied(activation: nn.Module) -> None:
    def both(m: Any, z: Tensor) -> Tensor:
        gate = m.squeeze(z.mean((2, 3), keepdim=True)).sigmoid()
        return m.conv(z * gate + 0 * z)

    gm = fold(SiteNet(both, activation).double().eval())
    assert called(gm).count(ConstantAffine) == 2  # that of the product, and of the sum
    assert sorted(len(n.args) for n in gm.graph.nodes if "affine" in str(n.target)) == [1]


def test_a_reader_of_the_affine_reads_the_normalizer() -> None:
    class Both(SiteNet):
        def forward(self, x: Tensor) -> Tensor:
            z, y = self.site(x)
            return self.conv(z + y)

    for activation in (nn.ReLU(inplace=True), nn.Hardswish(inplace=True)):
        model = Both(lambda m, z: z, activation).double().eval()
        model.site.outputs = ("output", "affine")
        gm = routed(model)
        before = gm(X)
        run(FoldProxyNorm(), gm)
        assert called(gm) == [nn.GroupNorm, type(activation), ConstantAffine, nn.Conv2d]
        assert_same_outputs(gm(X), before, tolerance=BY_HAND)


def test_a_site_called_twice_becomes_one_normalizer() -> None:
    class Twice(SiteNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.site(self.site(x)) + 1

    gm = routed(Twice(lambda m, z: z).double().eval())
    before = gm(X)
    assert run(FoldProxyNorm(), gm).rewritten == 1
    assert called(gm) == 2 * [nn.GroupNorm, nn.SiLU, ConstantAffine]
    assert count_modules(gm, nn.GroupNorm) == 1
    assert_same_outputs(gm(X), before, tolerance=BY_HAND)


def test_dtype_and_eps_are_kept() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = SiteNet(lambda m, z: z + 1).to(dtype).eval()
        model.site.eps = 1e-2
        gm = routed(model)
        run(FoldProxyNorm(), gm)
        assert gm.get_submodule("site").eps == 1e-2
        assert {value.dtype for value in gm.state_dict().values()} == {dtype}
        assert not any(module.training for module in gm.modules())


def test_a_graph_without_sites_stays() -> None:
    untouched(FoldProxyNorm(), traced(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.ReLU())))


def test_a_site_that_is_left_breaks_the_promise() -> None:
    gm = routed(SiteNet(lambda m, z: m.conv(z)))
    with pytest.raises(PostconditionError, match=r"site .ProxyNormAct. is not folded"):
        FoldProxyNorm().ensures(gm)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU()], ids=str)
def test_networks_written_with_the_layer_fold(activation: nn.Module) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        pn_compiler.nn.ProxyNormAct(2, 8, activation),
        nn.Conv2d(8, 8, 3),
        pn_compiler.nn.ProxyNormAct(1, 8, activation),
        nn.Conv2d(8, 4, 3, padding=1),
    ).double()
    randomize_proxies(net)
    folded = pn_compiler.fold(net)
    assert count_modules(folded, pn_compiler.nn.ProxyNormAct) == 0
    assert_same_outputs(folded(IMAGES.double()), net(IMAGES.double()), tolerance=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(2, 12),
    size=st.integers(3, 9),
    batch=st.integers(1, 4),
    padding=st.integers(0, 2),
    kernel=st.sampled_from([1, 3]),
    groups=st.sampled_from([None, 1, 2, 3]),
    activation=st.sampled_from([nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish()]),
    pool=st.sampled_from(
        [nn.Identity(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(2)]
    ),
    proxy_padding=st.sampled_from(["activation", "output"]),
    seed=st.integers(0, 2**16),
)
def test_folding_is_exact_for_odd_shapes(
    channels: int, size: int, batch: int, padding: int, kernel: int, groups: int | None,
    activation: nn.Module, pool: nn.Module, proxy_padding: str, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.BatchNorm2d(channels), activation, pool, nn.Conv2d(channels, 3, kernel, padding=padding + 1)
    )
    net = randomize_batch_norms(net, seed).double().eval()
    x = torch.randn(batch, channels, size, size, dtype=torch.float64)
    warm = pn_compiler.transform(net, num_groups=groups, proxy_padding=proxy_padding)
    if proxy_padding == "activation":
        plain = pn_compiler.transform(net, num_groups=groups, proxy=False)
        assert_same_outputs(warm(x), plain(x), tolerance=1e-9)
    scratch = pn_compiler.transform(net, num_groups=groups, proxy_padding=proxy_padding, warm_start="none")
    randomize_proxies(scratch)
    for model in (warm, scratch):
        assert_same_outputs(pn_compiler.fold(model)(x), model(x), tolerance=1e-9)
