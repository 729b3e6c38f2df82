"""Anchored statistics against their definition, written out in float64."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.nn import AnchoredNorm, FoldedNorm, ProxyNormAct, Statistics, normalize
from pn_compiler.testing import assert_batch_independent, assert_same_outputs

KINDS = ("anchored", "rms")


def reference(x: Tensor, site: AnchoredNorm | ProxyNormAct) -> Tensor:
    """The normalized x, group by group and sample by sample."""
    groups = site.num_groups
    result = torch.empty_like(x)
    for sample, out in zip(x, result, strict=True):
        for g, (part, place) in enumerate(zip(sample.chunk(groups), out.chunk(groups), strict=True)):
            b, var = site.anchor[g], site.population_var[g]
            center = site.population_mean[g] if site.statistics == "rms" else part.sum() / part.numel()
            deviation = part - center
            spread = (deviation**2).sum() / part.numel()
            place.copy_(deviation / ((1 - b) * spread + b * var + site.eps) ** 0.5)
    return result


def randomized(site: nn.Module, anchors: tuple[float, float] = (0.2, 0.7)) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.normal_(0, 0.4, generator=generator)
        site.weight += 1
        if site.population_mean is not None:
            site.population_mean.normal_(0, 1, generator=generator)
        site.population_var.uniform_(0.5, 3, generator=generator)
        site.anchor.uniform_(*anchors, generator=generator)
    return site.double()


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (3, 6, 5, 4), (2, 6, 3, 2, 4)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("statistics", KINDS)
def test_values_agree_with_the_definition(
    statistics: Statistics, groups: int, shape: tuple[int, ...]
) -> None:
    site = randomized(AnchoredNorm(groups, 6, 1e-3, statistics=statistics))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 1
    column = (-1, *[1] * (x.dim() - 2))
    expected = reference(x, site) * site.weight.view(column) + site.bias.view(column)
    assert_same_outputs(site(x), expected.detach())
    assert_same_outputs(normalize(site, x), reference(x, site))
    assert_batch_independent(site, x)


@pytest.mark.parametrize("statistics", KINDS)
def test_gradients_are_those_of_finite_differences(statistics: Statistics) -> None:
    site = randomized(AnchoredNorm(2, 4, statistics=statistics))
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(site, {"weight": weight, "bias": bias}, x)

    torch.autograd.gradcheck(run, (x, site.weight, site.bias))


@pytest.mark.parametrize("statistics", ["group", *KINDS])
def test_an_anchor_of_0_is_group_norm_about_the_mean(statistics: Statistics) -> None:
    site = randomized(AnchoredNorm(2, 4, statistics="anchored"), (0, 0))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert_same_outputs(site(x), F.group_norm(x, 2, site.weight, site.bias, site.eps))
    if statistics == "rms":
        site = randomized(AnchoredNorm(1, 4, statistics="rms"), (0, 0))
        nn.init.zeros_(site.population_mean)
        moved = x.movedim(1, -1)
        rms = x / (moved.square().mean((1, 2, 3)).view(-1, 1, 1, 1) + site.eps).sqrt()
        assert_same_outputs(normalize(site, x), rms)


def test_rms_with_an_anchor_of_1_is_batch_norm_in_eval_mode() -> None:
    norm = nn.BatchNorm2d(6).double().eval()
    site = randomized(AnchoredNorm(6, 6, norm.eps), (1, 1))
    with torch.no_grad():
        norm.running_mean.copy_(site.population_mean)
        norm.running_var.copy_(site.population_var)
        norm.weight.copy_(site.weight)
        norm.bias.copy_(site.bias)
    x = 5 * torch.randn(3, 6, 4, 4, dtype=torch.float64)
    assert_same_outputs(site(x), norm(x))


@pytest.mark.parametrize("make", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.PReLU, nn.Tanh])
@pytest.mark.parametrize("statistics", KINDS)
def test_sites_with_proxy_normalization_share_the_normalizer(
    statistics: Statistics, make: type[nn.Module]
) -> None:
    site = randomized(ProxyNormAct(2, 6, make(), statistics=statistics))
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64) * 3 + 1
    column = (6, 1, 1)
    affine = reference(x, site) * site.weight.view(column) + site.bias.view(column)
    scale, shift = site.scale_and_shift(torch.float64)
    expected = site.activation(affine) * scale.view(column) + shift.view(column)
    assert_same_outputs(site(x), expected.detach(), tolerance=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("statistics", KINDS)
def test_statistics_of_half_precision_are_computed_in_float32(
    statistics: Statistics, dtype: torch.dtype
) -> None:
    site = randomized(AnchoredNorm(1, 8, statistics=statistics)).float()
    x = (1000 * torch.randn(2, 8, 16, 16)).to(dtype)  # squares and sums are beyond float16
    actual = copy.deepcopy(site).to(dtype)(x)
    assert actual.dtype == dtype
    assert_same_outputs(actual, site(x.float()), tolerance=2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_autocast_leaves_the_statistics_in_float32() -> None:
    site = randomized(AnchoredNorm(1, 8)).float()
    x = (1000 * torch.randn(2, 8, 16, 16)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_outputs(site(x), site(x.float()).bfloat16())


@pytest.mark.parametrize("value", [0.0, 1e4, -3e4])
@pytest.mark.parametrize("anchors", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("statistics", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_constant_inputs_give_finite_outputs_and_gradients(
    dtype: torch.dtype, statistics: Statistics, anchors: tuple[float, float], value: float
) -> None:
    site = randomized(AnchoredNorm(2, 4, statistics=statistics), anchors).to(dtype)
    if statistics == "rms":
        nn.init.zeros_(site.population_mean)
    x = torch.full((2, 4, 3, 3), value, dtype=dtype, requires_grad=True)
    y = site(x)
    y.float().tanh().mean().backward()  # large outputs are right with an anchor of 1
    for tensor in (y, x.grad, site.weight.grad, site.bias.grad):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("statistics", KINDS)
def test_state_pickle_and_copies_keep_the_population(statistics: Statistics) -> None:
    sites = (AnchoredNorm(2, 4, statistics=statistics), ProxyNormAct(2, 4, nn.SiLU(), statistics=statistics))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for site in map(randomized, sites):
        fresh = copy.deepcopy(site)
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            tensor.data.zero_()
        fresh.load_state_dict(site.state_dict())
        for other in (fresh, copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
            assert torch.equal(other(x), site(x))
        assert {"population_var", "anchor"} < site.state_dict().keys()


def test_plain_sites_have_no_population() -> None:
    assert set(ProxyNormAct(2, 4, nn.ReLU()).state_dict()) == {
        "weight", "bias", "proxy_weight", "proxy_bias",
    }  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_memory_format_trains_and_is_kept(memory_format: torch.memory_format) -> None:
    site = randomized(AnchoredNorm(2, 4))
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    given = x.to(memory_format=memory_format)
    y = site(given)
    assert y.is_contiguous(memory_format=memory_format)
    assert_same_outputs(y, site(x))
    y.sum().backward()


def test_it_compiles_as_one_graph() -> None:
    site = randomized(AnchoredNorm(2, 4))
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    compiled = torch.compile(site, fullgraph=True, backend="aot_eager")
    assert_same_outputs(compiled(x), site(x))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("centered", [False, True])
def test_the_constant_scale_is_what_the_samples_moments_give(groups: int, centered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = FoldedNorm(
        groups, 6, centered=centered, share=None, var=torch.full((groups,), 0.3), weight=torch.ones(6),
        shift=None if centered else torch.randn(6, generator=generator), bias=torch.zeros(6),
    ).double()  # fmt: skip
    x = torch.randn(1, 6, 50, dtype=torch.float64, generator=generator) + torch.arange(6.0).view(6, 1)
    y = norm(x)
    slope = (y[..., 1] - y[..., 0]) / (x[..., 1] - x[..., 0])
    assert_same_outputs(norm.constant_scale(x[0].mean(1), x[0].var(1, correction=0)), slope[0].detach())


def test_impossible_arguments_are_errors() -> None:
    with pytest.raises(ConfigError, match="statistics"):
        AnchoredNorm(1, 4, statistics="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_groups"):
        AnchoredNorm(3, 4)
