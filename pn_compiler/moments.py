"""Mean and variance of an activation under a Gaussian: the proxy statistics.

u ~ Normal(mean, std^2). Everything is computed in float64 where the device has it, around f(mean), so
that the variance is a difference of small numbers.

The moments come with their slopes in mean and std, E f', E t f' and the like with t = (u - mean) / std. A
training step then differentiates nothing of this: the backward of `_Moments` is four products.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pn_compiler.activations import Coefficient, Pieces, is_smooth, kinks_of, pieces_of
from pn_compiler.errors import ConfigError

Method = Literal["exact", "quantile", "quadrature"]

_TINY = 1e-20  # std below it counts as this: the moments and their gradients stay finite at 0
_REACH = 40.0  # standard deviations; the normal density underflows to 0 beyond 39
_QUANTILES = 200  # nodes of the reference implementation
_SQRT_TAU = math.sqrt(2 * math.pi)


class Moments(NamedTuple):
    """Mean and variance of f(u); d mean/d m, d mean/d s, d var/d m and d var/d s for u ~ Normal(m, s^2)."""

    mean: Tensor
    var: Tensor
    slopes: tuple[Tensor, Tensor, Tensor, Tensor] | None


def proxy_moments(
    activation: Callable[[Tensor], Tensor],
    mean: Tensor,
    std: Tensor,
    *,
    method: Method = "exact",
) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``activation(u)``, u ~ Normal(mean, std^2), elementwise.

    Args:
        activation: a module or function that acts on each element alone. Modules of ``torch.nn``
            that are piecewise polynomial (ReLU, ReLU6, LeakyReLU, Hardswish, ...) are integrated in
            closed form; all others by quadrature.
        mean: mean of u, any shape.
        std: standard deviation of u, not negative, broadcastable with `mean`; may be 0.
        method: "exact" (closed form where there is one, else quadrature), "quadrature" (always), or
            "quantile" (the mean over the 200 mid-quantile nodes of the reference implementation, off
            by up to 3 %, for networks trained with it).

    Returns:
        (mean, variance) of the activation, in the broadcast shape and dtype of the arguments, and at
        least float32.

    Raises:
        ConfigError: `method` is unknown.

    Source: Labatie et al., NeurIPS 2021, section 5, and its public reference implementation.
    """
    if method not in ("exact", "quantile", "quadrature"):
        raise ConfigError(f"method={method!r}: expected one of 'exact', 'quantile', 'quadrature'")
    dtype = torch.promote_types(torch.promote_types(mean.dtype, std.dtype), torch.float32)
    wide = torch.float32 if mean.device.type == "mps" else torch.float64
    m, s = torch.broadcast_tensors(mean.to(wide), std.to(wide))  # type: ignore[no-untyped-call]  # torch's
    s = s.clamp_min(_TINY)
    if _slopes_help(activation):
        result = _Moments.apply(m, s, activation, method)  # type: ignore[no-untyped-call]  # torch's
    else:
        result = _moments(activation, m, s, method, slopes=False)[:2]
    return result[0].to(dtype), result[1].to(dtype)


def _moments(f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor, method: Method, *, slopes: bool) -> Moments:
    pieces = pieces_of(f) if method == "exact" else None
    if pieces is not None:
        return _by_pieces(pieces, m, s)
    nodes = _quantiles(m) if method == "quantile" else _nodes(f, m, s)
    return _by_nodes(f, m, s, nodes, slopes=slopes)


def _slopes_help(f: Callable[[Tensor], Tensor]) -> bool:
    """Whether to differentiate by `_Moments`: not inside a compiler or a transform of torch.func, which
    differentiate in their own way, nor if the activation itself learns, or jumps."""
    if is_transformed():
        return False
    if isinstance(f, torch.nn.Module) and next(f.parameters(), None) is not None:
        return False
    pieces = pieces_of(f)
    return pieces is None or not _jumps(pieces)


def is_transformed() -> bool:
    """Whether a compiler or a transform of torch.func looks on, so that no value may be asked for."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


class _Moments(torch.autograd.Function):
    """`_moments`, whose gradient comes from the slopes."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, s: Tensor, f: Callable[[Tensor], Tensor], method: Method) -> Any:
        mean, var, slopes = _moments(f, m, s, method, slopes=True)
        assert slopes is not None
        ctx.save_for_backward(m, s, *slopes)
        ctx.function, ctx.method = f, method
        return mean, var

    @staticmethod
    def backward(ctx: Any, by_mean: Tensor, by_var: Tensor) -> Any:
        m, s, *slopes = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a second derivative, which slopes do not have
            moments = _moments(ctx.function, m, s, ctx.method, slopes=False)
            grads = torch.autograd.grad(moments[:2], (m, s), (by_mean, by_var), create_graph=True)
            return *grads, None, None
        mean_by_m, mean_by_s, var_by_m, var_by_s = slopes
        return by_mean * mean_by_m + by_var * var_by_m, by_mean * mean_by_s + by_var * var_by_s, None, None


# Closed form ---------------------------------------------------------------------------------------

_EdgeTerms = tuple[Tensor, Tensor, Tensor, Tensor]  # t, Phi(t), Phi(-t), phi(t)


def _by_pieces(pieces: Pieces, m: Tensor, s: Tensor) -> Moments:
    """On each piece, with u = m + s t: f(u) - center = a0 + a1 t + a2 t^2 and f'(u) = b0 + b1 t."""
    center = _values_of(pieces, m).detach()  # the moments do not depend on it
    bounds = [_edge_terms(start, m, s) for start in (*(start for start, _ in pieces), math.inf)]
    sums: list[Any] = [0.0] * 6
    for (_, coefficients), lower, upper in zip(pieces, bounds[:-1], bounds[1:], strict=True):
        for index, term in enumerate(_terms_of_piece(coefficients, center, m, s, lower, upper)):
            sums[index] = sums[index] + term
    return _assemble(center, *sums)


def _values_of(pieces: Pieces, u: Tensor) -> Tensor:
    """f(u)"""
    (_, (c0, c1, c2)), *others = pieces
    values = c0 + c1 * u + c2 * u * u
    for start, (c0, c1, c2) in others:
        values = torch.where(u >= start, c0 + c1 * u + c2 * u * u, values)
    return values


def _terms_of_piece(
    coefficients: tuple[Coefficient, Coefficient, Coefficient],
    center: Tensor,
    m: Tensor,
    s: Tensor,
    lower: _EdgeTerms,
    upper: _EdgeTerms,
) -> tuple[Tensor, ...]:
    """What the piece adds to E g, E g^2, E f', E t f', E g f' and E t g f', with g = f - center."""
    c0, c1, c2 = coefficients
    t0, t1, t2, *higher = _truncated_moments(lower, upper, most=2 if _is_zero(c2) else 4)
    if not higher:
        a0, a1 = c0 + c1 * m - center, c1 * s
        g, gt = a0 * t0 + a1 * t1, a0 * t1 + a1 * t2  # E g, E t g
        return g, a0 * g + a1 * gt, c1 * t0, c1 * t1, c1 * g, c1 * gt
    t3, t4 = higher
    a0, a1, a2 = c0 + c1 * m + c2 * m * m - center, (c1 + 2 * c2 * m) * s, c2 * s * s
    b0, b1 = c1 + 2 * c2 * m, 2 * c2 * s
    g, gt, gtt = (a0 * p + a1 * q + a2 * r for p, q, r in ((t0, t1, t2), (t1, t2, t3), (t2, t3, t4)))
    squared = a0 * g + a1 * gt + a2 * gtt
    return g, squared, b0 * t0 + b1 * t1, b0 * t1 + b1 * t2, b0 * g + b1 * gt, b0 * gt + b1 * gtt


def _is_zero(coefficient: Coefficient) -> bool:
    return not isinstance(coefficient, Tensor) and coefficient == 0


def _assemble(center: Tensor, g: Tensor, squared: Tensor, *slopes: Tensor) -> Moments:
    """The moments from E g, E g^2 and, if given, E f', E t f', E g f' and E t g f', with g = f - center.

    As u = m + s t: d/dm E h(u) = E h'(u) and d/ds E h(u) = E t h'(u).
    """
    mean, var = center + g, (squared - g * g).clamp_min(0)
    if not slopes:
        return Moments(mean, var, None)
    by_m, by_s, g_by_m, g_by_s = slopes
    return Moments(mean, var, (by_m, by_s, 2 * (g_by_m - g * by_m), 2 * (g_by_s - g * by_s)))


def _jumps(pieces: Pieces) -> bool:
    """Whether f jumps somewhere: E f' then misses a part of the slope."""
    for (_, before), (start, after) in itertools.pairwise(pieces):
        left, right = (c0 + c1 * start + c2 * start * start for c0, c1, c2 in (before, after))
        if abs(float(left) - float(right)) > 1e-9:
            return True
    return False


def _edge_terms(edge: float, m: Tensor, s: Tensor) -> _EdgeTerms:
    if math.isinf(edge):  # constants: differentiating (inf - m) / s would give nan
        zero, one = torch.zeros_like(m), torch.ones_like(m)
        far = torch.full_like(m, math.copysign(_REACH, edge))
        return (far, one, zero, zero) if edge > 0 else (far, zero, one, zero)
    t = ((edge - m) / s).clamp(-_REACH, _REACH)
    return t, torch.special.ndtr(t), torch.special.ndtr(-t), torch.exp(-0.5 * t * t) * (1 / _SQRT_TAU)


def _truncated_moments(lower: _EdgeTerms, upper: _EdgeTerms, *, most: int) -> tuple[Tensor, ...]:
    """Integrals of t^k phi(t) between two edges, k = 0 to `most` (2 or 4), by parts."""
    (a, a_below, a_above, a_pdf), (b, b_below, b_above, b_pdf) = lower, upper
    # Phi(b) - Phi(a), from the tails on the side where they are small
    t0 = torch.where(a > 0, a_above - b_above, b_below - a_below)
    t1 = a_pdf - b_pdf
    a_term, b_term = a * a_pdf, b * b_pdf
    t2 = t0 + a_term - b_term
    if most == 2:
        return t0, t1, t2
    t3 = 2 * t1 + a * a_term - b * b_term
    t4 = 3 * t2 + a * a * a_term - b * b * b_term
    return t0, t1, t2, t3, t4


# Quadrature ----------------------------------------------------------------------------------------

_NODES_PER_PANEL = 8
_PANELS_IN_T = tuple(np.linspace(-9.0, 9.0, 13))  # phi(9) = 1e-18
_PANELS_IN_U = (-40.0, -20.0, -10.0, -5.0, -2.5, -1.0, 0.0, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0)

# The trapezoidal rule converges geometrically for functions that are analytic in a strip of half-width d:
# its relative error with step h in u is about exp(-2 pi d / h) (Trefethen & Weideman, SIAM Review 2014).
# The smooth activations of the table have d >= pi / 2 (tanh), so h = 0.45 gives 3e-10.
_STEP_IN_U = 0.45
_LARGEST_STEP_IN_T = 0.6  # exp(-2 pi^2 / h^2) = 2e-24 for the normal density
_SPREAD = 8.6  # standard deviations; 2 Phi(-8.6) = 8e-18
_WIDEST = 4.0  # std above it: panels take fewer nodes


def _nodes(f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes t and weights w with E f(u) = sum of w f(m + s t), over a new last axis."""
    if is_smooth(f) and s.device.type == "cpu" and type(s) is Tensor and not is_transformed():
        widest = float(s.detach().max()) if s.numel() else 0.0
        if widest <= _WIDEST:  # false for nan
            step = _LARGEST_STEP_IN_T if widest <= 0 else min(_LARGEST_STEP_IN_T, _STEP_IN_U / widest)
            return _trapezoid(math.ceil(_SPREAD / step), m)
    return _panels(f, m, s)


def _trapezoid(steps: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """2 `steps` + 1 equidistant nodes over +-8.6."""
    t = torch.linspace(-_SPREAD, _SPREAD, 2 * steps + 1, dtype=like.dtype, device=like.device)
    w = torch.exp(-0.5 * t * t)
    return t, w / w.sum()


@functools.cache
def _legendre() -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.legendre.leggauss(_NODES_PER_PANEL)
    return nodes.tolist(), weights.tolist()


@torch.no_grad()  # the integral does not depend on where the panels meet
def _panels(f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes on panels that resolve both the density (in t) and the activation (in u)."""
    edges_in_u = m.new_tensor(sorted({*_PANELS_IN_U, *kinks_of(f)}))
    in_t = m.new_tensor(_PANELS_IN_T).expand(*m.shape, -1)
    in_u = ((edges_in_u - m[..., None]) / s[..., None]).clamp(in_t[..., :1], in_t[..., -1:])
    edges = torch.cat([in_t, in_u], dim=-1).sort(dim=-1).values
    half = (edges[..., 1:] - edges[..., :-1])[..., None] / 2
    nodes, weights = (m.new_tensor(values) for values in _legendre())
    t = (edges[..., :-1, None] + half * (1 + nodes)).flatten(-2)
    w = (half * weights).flatten(-2) * torch.exp(-0.5 * t * t)
    return t, w / w.sum(-1, keepdim=True)


def _quantiles(like: Tensor) -> tuple[Tensor, Tensor]:
    """Equal weights at t = Phi^-1((i + 1/2) / 200)."""
    grid = (torch.arange(_QUANTILES, dtype=like.dtype, device=like.device) + 0.5) / _QUANTILES
    t = torch.special.ndtri(grid)
    return t, torch.full_like(t, 1 / _QUANTILES)


def _by_nodes(
    f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor, nodes: tuple[Tensor, Tensor], *, slopes: bool
) -> Moments:
    t, w = nodes
    center = f(m).detach()
    u = m[..., None] + s[..., None] * t
    if not slopes:
        g = f(u) - center[..., None]
        wg = w * g
        return _assemble(center, wg.sum(-1), (wg * g).sum(-1))
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        value = f(u)
        (slope,) = torch.autograd.grad(value.sum(), u)
    g = value.detach() - center[..., None]
    wg, ws = w * g, w * slope
    sums = (wg, wg * g, ws, ws * t, wg * slope, wg * slope * t)
    return _assemble(center, *(values.sum(-1) for values in sums))
