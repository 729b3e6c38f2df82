"""The gradient that a site computes by hand, against autograd through the moments."""

import pytest
import torch
from torch import Tensor, nn

from pn_compiler.numerics.moments import moments
from pn_compiler.numerics.proxy_statistics import scale_and_shift, site_affine
from pn_compiler.operators.activations import is_homogeneous
from tests.numerics.test_moments import ACTIVATIONS

M = torch.tensor([-30.0, -8.0, -3.0, -0.4, 0.0, 0.7, 3.0, 6.0, 8.0, 30.0], dtype=torch.float64)


def autograd_slopes(activation: nn.Module, m: Tensor, s: Tensor) -> list[Tensor]:
    """d mean/dm, d mean/ds, d var/dm and d var/ds."""
    m, s = m.clone().requires_grad_(), s.clone().requires_grad_()
    result = moments(activation, m, s)
    return [
        gradient
        for value in (result.mean, result.var)
        for gradient in torch.autograd.grad(value.sum(), (m, s), retain_graph=True)
    ]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("std", [1e-3, 0.05, 0.7, 2.0, 3.9, 4.1, 30.0])
def test_slopes_are_the_derivatives_of_the_moments(activation: nn.Module, std: float) -> None:
    s = torch.full_like(M, std)
    with torch.no_grad():
        result = moments(activation, M, s, slopes=True)
    assert result.mean_by is not None
    assert result.var_by is not None
    for actual, expected in zip(
        (*result.mean_by, *result.var_by), autograd_slopes(activation, M, s), strict=True
    ):
        assert (actual - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_without_spread_the_slope_is_that_of_the_activation(activation: nn.Module) -> None:
    m = torch.tensor([-7.0, -2.1, -0.3, 0.2, 1.7, 7.0], dtype=torch.float64)  # where none of them bends
    with torch.no_grad():
        result = moments(activation, m, torch.zeros_like(m), slopes=True)
    u = m.clone().requires_grad_()
    (expected,) = torch.autograd.grad(activation(u).sum(), u)
    assert result.mean_by is not None
    assert result.var_by is not None
    assert (result.mean_by[0] - expected).abs().max() < 1e-6
    assert result.mean_by[1].abs().max() < 1e-5
    assert result.var_by.abs().max() < 1e-5


def test_a_wild_channel_changes_nothing_for_the_others() -> None:
    calm, wild = torch.tensor([0.3, 1.2, 2.0]), torch.tensor([0.3, 40.0, 1.2, 9.0, 2.0])
    m = torch.tensor([0.1, -0.5, 1.0], dtype=torch.float64)
    mixed = torch.tensor([0.1, 3.0, -0.5, -7.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        alone = moments(nn.SiLU(), m, calm.double(), slopes=True)
        together = moments(nn.SiLU(), mixed, wild.double(), slopes=True)
        each = [moments(nn.SiLU(), mixed[i : i + 1], wild[i : i + 1].double(), slopes=True) for i in range(5)]
    for actual, expected, parts in zip(together, alone, zip(*each, strict=True), strict=True):
        assert actual is not None
        assert expected is not None
        torch.testing.assert_close(actual[..., [0, 2, 4]], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(actual, torch.cat(parts, -1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.SiLU(), nn.ELU()], ids=str)
def test_first_and_second_derivatives(activation: nn.Module) -> None:
    torch.manual_seed(0)
    parameters = torch.randn(4, 5, dtype=torch.float64) * 0.4 + torch.tensor([[1.0], [0], [0], [0]])
    parameters[0, 2] = -0.7  # a negative weight: the deviation is its magnitude
    parameters.requires_grad_()

    def both(p: Tensor) -> tuple[Tensor, ...]:
        into_affine = is_homogeneous(activation)
        return tuple(t for t in site_affine(p, activation, 0.03, into_affine=into_affine) if t is not None)

    assert torch.autograd.gradcheck(both, parameters, atol=1e-6, rtol=1e-5)
    assert torch.autograd.gradgradcheck(both, parameters, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_parameters_have_float32_statistics(dtype: torch.dtype) -> None:
    parameters = (torch.randn(4, 64) * 0.3).to(dtype).requires_grad_()
    affine = site_affine(parameters, nn.SiLU(), 0.03, into_affine=False)
    assert affine.scale is not None
    assert affine.scale.dtype == affine.shift.dtype == torch.float32
    expected = scale_and_shift(parameters.double(), nn.SiLU(), 0.03)
    torch.testing.assert_close((affine.scale, affine.shift), tuple(t.float() for t in expected))
    (affine.scale.sum() + affine.shift.sum()).backward()
    assert parameters.grad is not None
    assert parameters.grad.dtype == dtype
