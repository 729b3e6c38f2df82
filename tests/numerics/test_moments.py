"""proxy_moments against integrals computed another way."""

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import nn

import pn_compiler
from pn_compiler.base.errors import ConfigError
from pn_compiler.operators.activations import strip_of

ACTIVATIONS = [
    nn.Identity(),
    nn.ReLU(),
    nn.ReLU6(),
    nn.Hardtanh(-0.5, 2.0),
    nn.LeakyReLU(0.1),
    nn.Threshold(0.3, -1.0),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Mish(),
    nn.Softplus(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.ELU(),
    nn.SELU(),
    nn.CELU(0.5),
    nn.LogSigmoid(),
    nn.Softsign(),
    nn.Tanhshrink(),
    # bounds without end, slopes that bend the other way, and options that move or sharpen the bend
    nn.Hardtanh(0.0, math.inf),
    nn.Hardtanh(-math.inf, 1.0),
    nn.Hardtanh(-1e9, 1e9),
    nn.Hardtanh(-1e30, 1.0),
    nn.LeakyReLU(-0.3),
    nn.LeakyReLU(3.0),
    nn.Threshold(-2.0, 5.0),
    nn.Softplus(1.0, 1.0),
    nn.Softplus(0.5, 0.3),
    nn.Softplus(5.0, -1.0),
    nn.Softplus(100.0, 30.0),
    nn.Softplus(0.1, 30.0),
    nn.Softplus(-2.0, 1.0),
    nn.ELU(5.0),
    nn.CELU(0.01),
]
MEANS = [-30.0, -3.0, -0.4, 0.0, 0.7, 3.0, 30.0]
STDS = [0.01, 0.3, 1.0, 4.0, 30.0]
# where any of them bends, or begins and ends to bend sharply
BREAKS = [-3.0, -2.0, -1.0, -0.5, -0.2, -0.05, 0.0, 0.05, 0.3, 0.6, 1.0, 2.0, 3.0, 6.0]


def density(t: float) -> float:
    """Of the standard normal; 200 times as fast as scipy's, which is for arrays."""
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


@functools.cache
def adaptive(activation: nn.Module, mean: float, std: float) -> tuple[float, float]:
    """Moments by scipy's adaptive quadrature, split where the activation may bend."""

    def f(t: float) -> float:
        return float(activation(torch.tensor([mean + std * t], dtype=torch.float64)))

    def integral(g: object) -> float:
        splits = sorted({(b - mean) / std for b in BREAKS if abs((b - mean) / std) < 10} | {-10.0, 0.0, 10.0})
        parts = [
            integrate.quad(g, a, b, epsabs=1e-13, epsrel=1e-12, limit=200)[0]
            for a, b in itertools.pairwise(splits)
        ]
        return math.fsum(parts)

    center = f(0.0)
    first = integral(lambda t: (f(t) - center) * density(t))
    second = integral(lambda t: (f(t) - center) ** 2 * density(t))
    return center + first, second - first**2


@pytest.mark.parametrize("activation", ACTIVATIONS[:20], ids=str)
@pytest.mark.parametrize("method", ["exact", "quadrature"])
def test_agrees_with_adaptive_quadrature(activation: nn.Module, method: str) -> None:
    grid = [(m, s) for m in MEANS for s in STDS][::3]  # a third: adaptive quadrature is slow
    means, stds = (torch.tensor(values, dtype=torch.float64) for values in zip(*grid, strict=True))
    got_mean, got_var = pn_compiler.proxy_moments(activation, means, stds, method=method)
    for index, (mean, std) in enumerate(grid):
        want_mean, want_var = adaptive(activation, mean, std)
        scale = want_var + 0.03
        assert abs(float(got_mean[index]) - want_mean) / math.sqrt(scale) < 1e-6
        assert abs(float(got_var[index]) - want_var) / scale < 1e-6


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_float32_is_as_good_as_float32_can_be(activation: nn.Module) -> None:
    means, stds = torch.meshgrid(torch.tensor(MEANS), torch.tensor(STDS), indexing="ij")
    mean, var = pn_compiler.proxy_moments(activation, means, stds)
    want_mean, want_var = pn_compiler.proxy_moments(activation, means.double(), stds.double())
    assert mean.dtype == var.dtype == torch.float32
    scale = want_var + 0.03
    assert ((mean - want_mean).abs() / scale.sqrt()).max() < 1e-5
    assert ((var - want_var).abs() / scale).max() < 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradients_are_right_and_finite_even_without_spread(activation: nn.Module) -> None:
    mean = torch.tensor([-2.1, -0.4, 0.2, 2.3, 30.0], dtype=torch.float64, requires_grad=True)
    std = torch.tensor([0.5, 1.3, 0.02, 3.0, 30.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, s: pn_compiler.proxy_moments(activation, m, s), (mean, std), atol=1e-5, rtol=1e-4
    )
    mean = torch.tensor([-30.0, -3.0, 0.0, 0.5, 3.0, 6.0, 30.0], requires_grad=True)
    std = torch.zeros(7, requires_grad=True)
    got_mean, got_var = pn_compiler.proxy_moments(activation, mean, std)
    torch.testing.assert_close(got_mean, activation(mean))
    torch.testing.assert_close(got_var, torch.zeros(7))
    (got_mean.sum() + (got_var + 0.03).rsqrt().sum()).backward()
    assert mean.grad is not None
    assert std.grad is not None
    assert torch.isfinite(mean.grad).all()
    assert torch.isfinite(std.grad).all()


def test_relu_in_closed_form() -> None:
    mean, var = pn_compiler.proxy_moments(nn.ReLU(), torch.zeros(1), torch.full((1,), 2.0))
    assert float(mean) == pytest.approx(2 / math.sqrt(2 * math.pi), rel=1e-6)
    assert float(var) == pytest.approx(4 * (0.5 - 1 / (2 * math.pi)), rel=1e-6)


def test_slope_per_channel_learns() -> None:
    activation = nn.PReLU(3)
    mean = torch.tensor([0.1, -0.5, 1.0])
    _, var = pn_compiler.proxy_moments(activation, mean, torch.ones(3))
    var.sum().backward()
    assert activation.weight.grad is not None
    assert (activation.weight.grad != 0).all()


def test_a_learned_slope_is_integrated_like_a_fixed_one() -> None:
    m = torch.tensor(MEANS, dtype=torch.float64)[:, None].requires_grad_()
    s = torch.tensor([0.0, *STDS], dtype=torch.float64).requires_grad_()
    learned = pn_compiler.proxy_moments(nn.PReLU(init=0.25), m, s)
    fixed = pn_compiler.proxy_moments(nn.LeakyReLU(0.25), m, s)
    for actual, expected in zip(learned, fixed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        gradients = (torch.autograd.grad(t.sum(), (m, s), retain_graph=True) for t in (actual, expected))
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_any_elementwise_callable() -> None:
    mean, std = torch.tensor([0.3]), torch.tensor([0.8])
    actual = pn_compiler.proxy_moments(torch.sin, mean, std)
    expected = math.exp(-0.32) * math.sin(0.3)  # E sin(u) = exp(-s^2 / 2) sin(m)
    assert float(actual[0]) == pytest.approx(expected, rel=1e-5)
    assert float(pn_compiler.proxy_moments(F.relu, mean, std)[0]) == pytest.approx(
        float(pn_compiler.proxy_moments(nn.ReLU(), mean, std)[0]), rel=1e-5
    )


def test_quantile_is_the_mean_over_the_reference_nodes() -> None:
    nodes = stats.norm.ppf((np.arange(200) + 0.5) / 200)
    values = np.maximum(0.3 + 0.8 * nodes, 0)
    mean, var = pn_compiler.proxy_moments(
        nn.ReLU(), torch.tensor([0.3]), torch.tensor([0.8]), method="quantile"
    )
    assert float(mean) == pytest.approx(values.mean(), rel=1e-6)
    assert float(var) == pytest.approx(values.var(), rel=1e-5)


def test_half_precision_is_computed_in_float32() -> None:
    mean, var = pn_compiler.proxy_moments(
        nn.ReLU(), torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)
    )
    assert mean.dtype == var.dtype == torch.float32


def test_refuses_an_unknown_method() -> None:
    with pytest.raises(ConfigError, match="'exact', 'quantile', 'quadrature'"):
        pn_compiler.proxy_moments(nn.ReLU(), torch.zeros(1), torch.ones(1), method="magic")  # type: ignore[arg-type]


SMOOTH = [a for a in ACTIVATIONS if strip_of(a) is not None]


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
@pytest.mark.parametrize("std", [0.0, 0.05, 0.7, 1.0, 2.0, 3.9, 4.1])
def test_every_spread_has_enough_nodes(activation: nn.Module, std: float) -> None:
    """Values and gradients against 20,000 nodes, each spread alone: the number of nodes follows it."""
    m = torch.linspace(-8, 8, 23, dtype=torch.float64, requires_grad=True)
    s = torch.full_like(m, std).requires_grad_()
    mean, var = pn_compiler.proxy_moments(activation, m, s)
    t = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    w = torch.exp(-t * t / 2)
    w = w / w.sum()
    y = activation(m[:, None] + s[:, None] * t)
    want_mean = y @ w
    want_var = ((y - want_mean[:, None]) ** 2) @ w
    assert (mean - want_mean).abs().max() < 1e-6
    assert ((var - want_var).abs() / (want_var + 0.03)).max() < 1e-6
    for actual, want in ((mean, want_mean), (var, want_var)):
        gradients = torch.autograd.grad(actual.sum(), (m, s), retain_graph=True)
        expected = torch.autograd.grad(want.sum(), (m, s), retain_graph=True)
        for gradient, reference in zip(gradients, expected, strict=True):
            assert (gradient - reference).abs().max() < 1e-6 * (1 + reference.abs().max())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardswish(), nn.SiLU(), nn.ELU()], ids=str)
def test_second_derivatives_and_transforms(activation: nn.Module) -> None:
    m = torch.tensor([-0.4, 0.2, 2.3], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([1.3, 0.7, 3.0], dtype=torch.float64, requires_grad=True)

    def moments(m: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pn_compiler.proxy_moments(activation, m, s)

    assert torch.autograd.gradgradcheck(moments, (m, s), atol=1e-4, rtol=1e-3)
    each = torch.func.vmap(torch.func.grad(lambda m, s: moments(m, s)[1]))(m, s)
    torch.testing.assert_close(each, torch.autograd.grad(moments(m, s)[1].sum(), m)[0])


EXTREME_MEANS = [-1e4, -3.0, 0.0, 0.7, 300.0, 1e4]
EXTREME_STDS = [1e-12, 1e-3, 1.0, 1e3, 1e4]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("method", ["exact", "quadrature"])
def test_extreme_means_and_deviations_cost_no_digits(activation: nn.Module, method: str) -> None:
    grid = list(itertools.product(EXTREME_MEANS, EXTREME_STDS))
    m, s = (torch.tensor(values, dtype=torch.float64) for values in zip(*grid, strict=True))
    got_mean, got_var = pn_compiler.proxy_moments(activation, m, s, method=method)
    for index, (mean, std) in enumerate(grid):
        want_mean, want_var = on_fine_panels(activation, mean, std)
        scale = want_var + 0.03
        assert abs(float(got_mean[index]) - want_mean) / math.sqrt(scale) < 1e-6
        assert abs(float(got_var[index]) - want_var) / scale < 1e-6


def on_fine_panels(activation: nn.Module, mean: float, std: float) -> tuple[float, float]:
    """Moments by 80 Gauss-Legendre nodes on panels split where the activation bends, and at powers of 10."""
    breaks = [
        *BREAKS,
        *(sign * digit * 10.0**k for sign in (-1, 1) for digit in (1, 3) for k in range(-2, 4)),
    ]
    edges = np.array(
        sorted({(b - mean) / std for b in breaks if abs((b - mean) / std) < 10} | {*range(-10, 11)})
    )
    x, weights = np.polynomial.legendre.leggauss(80)
    half = (edges[1:] - edges[:-1])[:, None] / 2
    t, w = (edges[:-1, None] + half * (1 + x)).ravel(), (half * weights).ravel()
    w = w * stats.norm.pdf(t)

    def f(u: np.ndarray) -> np.ndarray:
        return activation(torch.from_numpy(u)).numpy()

    (center,) = f(np.array([mean]))
    y = f(mean + std * t) - center
    first = math.fsum(w * y)
    return center + first, math.fsum(w * (y - first) ** 2)


@pytest.mark.parametrize("slope", [-2.0, 0.0, 1e3])
def test_learned_slopes_of_any_sign_and_size(slope: float) -> None:
    grid = list(itertools.product(EXTREME_MEANS, EXTREME_STDS))
    m, s = (torch.tensor(values, dtype=torch.float64) for values in zip(*grid, strict=True))
    learned = pn_compiler.proxy_moments(nn.PReLU(init=slope).double(), m, s)
    fixed = pn_compiler.proxy_moments(nn.LeakyReLU(slope), m, s)
    for actual, expected in zip(learned, fixed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "bounds", [(0.0, math.inf), (-math.inf, 1.0), (-math.inf, math.inf), (-1e30, 1e300)], ids=str
)
def test_bounds_without_end_have_finite_moments_and_gradients(
    bounds: tuple[float, float], dtype: torch.dtype
) -> None:
    mean = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0], dtype=dtype, requires_grad=True)
    std = torch.tensor([0.0, 0.5, 1.0, 10.0, 100.0], dtype=dtype, requires_grad=True)
    result = pn_compiler.proxy_moments(nn.Hardtanh(*bounds), mean, std)
    (result[0].sum() + result[1].sum()).backward()
    for tensor in (*result, mean.grad, std.grad):
        assert tensor is not None
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("activation", [nn.Threshold(0.3, -1.0), nn.Softplus(1.0, 0.5)], ids=str)
def test_quadrature_has_the_gradient_of_a_jump(activation: nn.Module) -> None:
    m = torch.tensor([-0.4, 0.3, 1.1], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([1.3, 0.7, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, s: pn_compiler.proxy_moments(activation, m, s, method="quadrature"), (m, s), rtol=1e-4
    )


@pytest.mark.parametrize("kind", [nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.ReLU, nn.Hardswish])
@pytest.mark.parametrize("method", ["exact", "quadrature"])
def test_activations_that_work_in_place_leave_their_arguments_alone(kind: Any, method: str) -> None:
    mean, std = torch.tensor([-1.0, 0.5], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    actual = pn_compiler.proxy_moments(kind(inplace=True), mean, std, method=method)  # type: ignore[arg-type]
    expected = pn_compiler.proxy_moments(kind(), mean, std, method=method)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert mean.tolist() == [-1.0, 0.5]
