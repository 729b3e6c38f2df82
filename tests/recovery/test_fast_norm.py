"""The normalizers of a distillation in one operation: the same values and gradients as composed ones."""

import pytest
import torch
from torch import Tensor, nn

from pn_compiler.nn import AnchoredNorm, ProxyNormAct
from pn_compiler.recovery.fast_norm import fast_norms

SHAPES = [(3, 6, 5, 4), (2, 6, 7), (2, 6, 3, 2, 4)]


def site(kind: str, groups: int, anchor: float, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    norm = AnchoredNorm(groups, 6, statistics=kind, dtype=dtype)
    for values in (norm.weight, norm.bias):
        nn.init.normal_(values)
    norm.population_var.copy_(torch.rand(groups) + 0.5)
    norm.anchor.fill_(anchor)
    if norm.population_mean is not None:
        norm.population_mean.copy_(torch.randn(groups))
    return norm


def results(norm: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, [x, norm.weight, norm.bias], g)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("anchor", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", ["rms", "anchored"])
def test_values_and_gradients(kind: str, groups: int, anchor: float, shape: tuple[int, ...]) -> None:
    norm = site(kind, groups, anchor)
    x, g = torch.randn(2, *shape, dtype=torch.float64)
    expected = results(norm, x, g)
    with fast_norms(norm):
        actual = results(norm, x, g)
        assert norm(x.requires_grad_()).grad_fn.name().startswith("_AnchoredNorm")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert "normalize" not in vars(norm)


def test_float32_of_a_large_map_and_the_memory_format() -> None:
    norm = site("rms", 1, 0.5)
    x = torch.randn(2, 6, 112, 112, dtype=torch.float64).to(memory_format=torch.channels_last) + 3
    g = torch.randn_like(x)
    expected = results(norm, x, g)
    with fast_norms(norm.float()):
        actual = results(norm, x.float(), g.float())
    for a, e in zip(actual, expected, strict=True):
        assert float((a.double() - e).norm() / e.norm()) < 2e-6
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    assert actual[1].is_contiguous(memory_format=torch.channels_last)


def test_constant_inputs_have_finite_gradients() -> None:
    """The norm of zeros has no derivative; the sum of squares has."""
    norm = site("rms", 1, 0.0)
    x = norm.population_mean.expand(1, 6, 4, 4)
    expected = results(norm, x, torch.ones_like(x))
    with fast_norms(norm):
        actual = results(norm, x, torch.ones_like(x))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_what_it_leaves_to_the_module() -> None:
    """Rows without space, half precision, a site with proxy statistics of its own, a plain GroupNorm."""
    flat = site("rms", 1, 0.5)
    half = site("rms", 1, 0.5, torch.bfloat16)
    proxy = ProxyNormAct(1, 6, nn.ReLU(), statistics="rms")
    others = nn.ModuleList([nn.GroupNorm(1, 6), ProxyNormAct(1, 6, nn.ReLU())])
    for norm, x in ((flat, torch.randn(4, 6).double()), (half, torch.randn(2, 6, 3, 3).bfloat16())):
        expected = norm(x)
        with fast_norms(norm):
            assert torch.equal(norm(x), expected)
    x = torch.randn(2, 6, 3, 3)
    expected = proxy(x)
    with fast_norms(proxy), fast_norms(others):
        torch.testing.assert_close(proxy(x), expected)
        assert not any("normalize" in vars(norm) for norm in others)
