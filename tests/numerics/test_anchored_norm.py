"""The normalizers with constant statistics, in one operation and composed of operators: no difference."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from pn_compiler.nn import AnchoredNorm, Normalizer, ProxyNormAct, Statistics
from pn_compiler.numerics import anchored_norm as module
from pn_compiler.numerics.anchored_norm import Population, anchored_norm

SHAPES = [(3, 6, 5, 4), (2, 6, 7), (2, 6, 3, 2, 4), (1, 6, 1, 1)]
KINDS = ("rms", "anchored")


def site(kind: Statistics, groups: int, anchor: float, dtype: torch.dtype = torch.float64) -> AnchoredNorm:
    torch.manual_seed(0)
    norm = AnchoredNorm(groups, 6, statistics=kind, dtype=dtype)
    for values in (norm.weight, norm.bias):
        nn.init.normal_(values)
    norm.population_var.copy_(torch.rand(groups) + 0.5)
    norm.anchor.fill_(anchor)
    if norm.population_mean is not None:
        norm.population_mean.copy_(torch.randn(groups))
    return norm


def composed(norm: Normalizer, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    population = Population(norm.population_mean, norm.population_var, norm.anchor)
    return module._composed(x, norm.num_groups, weight, bias, population, norm.eps)


def is_fused(y: Tensor) -> bool:
    return y.grad_fn is not None and y.grad_fn.name().startswith("_AnchoredNorm")


def assert_same_gradients(norm: AnchoredNorm, x: Tensor, g: Tensor, tolerance: float = 1e-12) -> None:
    x, found = x.detach().requires_grad_(), []
    for y in (norm(x), composed(norm, x, norm.weight, norm.bias)):
        found.append([y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], g)])
        assert is_fused(y) == (len(found) == 1)
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("anchor", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: Statistics, groups: int, anchor: float, shape: tuple[int, ...]) -> None:
    x, g = torch.randn(2, *shape, dtype=torch.float64)
    assert_same_gradients(site(kind, groups, anchor), x, g)


def test_anchors_of_groups_may_differ() -> None:
    norm = site("rms", 3, 0.0)
    norm.anchor.copy_(torch.tensor([0.0, 0.6, 1.0]))
    assert_same_gradients(norm, *torch.randn(2, *SHAPES[0], dtype=torch.float64))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [(False, False), (True, False), (True, True)])
def test_first_and_second_derivatives(affine: tuple[bool, bool], kind: Statistics, groups: int) -> None:
    norm = site(kind, groups, 0.6)
    population = Population(norm.population_mean, norm.population_var, norm.anchor)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = weight if affine[0] else None, bias if affine[1] else None
        y = anchored_norm(x, groups, *given, population, 1e-3)
        assert is_fused(y)
        return y

    inputs = (torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True), norm.weight, norm.bias)
    used = [True, *affine]
    free = [v if used[i] else v.detach() for i, v in enumerate(inputs)]
    assert torch.autograd.gradcheck(run, free)
    assert torch.autograd.gradgradcheck(run, free)


@pytest.mark.parametrize("trained", ["x", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(trained: str) -> None:
    norm = site("rms", 1, 0.5).requires_grad_(False)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    leaf = x if trained == "x" else getattr(norm, trained)
    leaf.requires_grad_()
    expected = torch.autograd.grad(composed(norm, x, norm.weight, norm.bias).square().sum(), leaf)
    for create_graph in (False, True):
        actual = torch.autograd.grad(norm(x).square().sum(), leaf, create_graph=create_graph)
        torch.testing.assert_close(actual, expected)


def test_float32_of_a_large_map_and_the_memory_format() -> None:
    norm = site("rms", 1, 0.5)
    x = torch.randn(2, 6, 112, 112, dtype=torch.float64) + 3
    g = torch.randn_like(x)
    expected = []
    for values in (norm.double(), copy.deepcopy(norm).float()):
        like = values.weight
        given = x.to(like).to(memory_format=torch.channels_last).requires_grad_()
        y = values(given)
        actual = [y.detach(), *torch.autograd.grad(y, [given, values.weight, values.bias], g.to(like))]
        expected = expected or actual
    for a, e in zip(actual, expected, strict=True):
        assert float((a.double() - e).norm() / e.norm()) < 2e-6
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    assert actual[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_rounds_once(kind: Statistics, dtype: torch.dtype) -> None:
    norm = site(kind, 3, 0.5).to(dtype)
    x, g = (torch.randn(2, 4, 6, 5, 5) * 3).to(dtype)
    exact = copy.deepcopy(norm).double()
    x.requires_grad_()
    found = []
    for values in (norm, exact):
        given = x.detach().to(values.weight.dtype).requires_grad_()
        y = values(given)
        assert is_fused(y)
        found.append([y, *torch.autograd.grad(y, [given, values.weight, values.bias], g.to(y))])
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
        )


def test_constant_inputs_have_finite_gradients() -> None:
    """The norm of zeros has no derivative; the sum of squares has."""
    norm = site("rms", 1, 0.0)
    x = norm.population_mean.expand(1, 6, 4, 4)
    assert_same_gradients(norm, x, torch.ones_like(x), 1e-7)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_is_left_to_composed_operators() -> None:
    """Rows without space, transforms, forward-mode derivatives, tracers, and populations that learn."""
    norm = site("rms", 1, 0.5)
    x = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)
    assert not is_fused(norm(x[..., 0]))
    expected = composed(norm, x, norm.weight, norm.bias)
    torch.testing.assert_close(torch.func.vmap(lambda row: norm(row[None])[0])(x), expected)
    tangent = torch.randn_like(x)
    _, by_func = torch.func.jvp(norm, (x,), (tangent,))
    with forward_ad.dual_level():
        y = norm(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, by_func)
    torch.testing.assert_close(torch.jit.trace(norm, x)(2 * x), norm(2 * x))
    called = {str(node.target) for node in make_fx(norm)(x).graph.nodes}
    assert "aten.rsqrt.default" in called
    assert "aten.mul_.Tensor" not in called
    norm.anchor.requires_grad_()
    assert torch.autograd.grad(norm(x).square().sum(), norm.anchor)[0].abs() > 0
    assert norm(x[:0]).shape == (0, 6, 3)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()], ids=str)
def test_forward_mode_derivatives_of_a_site_with_statistics_of_its_own(activation: nn.Module) -> None:
    norm = ProxyNormAct(1, 6, activation, statistics="rms", dtype=torch.float64)
    weight, x = norm.weight.detach(), torch.randn(2, 6, 3, dtype=torch.float64)

    def run(weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, x)

    tangent = torch.randn_like(weight)
    _, expected = torch.func.jvp(run, (weight,), (tangent,))
    with forward_ad.dual_level():
        actual = forward_ad.unpack_dual(run(forward_ad.make_dual(weight, tangent))).tangent
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sites_with_an_activation_in_place(kind: Statistics) -> None:
    norm = ProxyNormAct(1, 6, nn.ReLU(inplace=True), statistics=kind, dtype=torch.float64)
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
