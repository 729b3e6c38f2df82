"""Mean and variance of an activation under a Gaussian: the proxy statistics.

u ~ Normal(mean, std^2). Everything is computed in float64 where the device has it, around f(mean), so
that the variance is a difference of small numbers, and differentiably.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pn_compiler.activations import Pieces, kinks_of, pieces_of
from pn_compiler.errors import ConfigError

Method = Literal["exact", "quantile", "quadrature"]
Moments = tuple[Tensor, Tensor]

_TINY = 1e-20  # std below it counts as this: the moments and their gradients stay finite at 0
_REACH = 40.0  # standard deviations; the normal density underflows to 0 beyond 39
_QUANTILES = 200  # nodes of the reference implementation


def proxy_moments(
    activation: Callable[[Tensor], Tensor],
    mean: Tensor,
    std: Tensor,
    *,
    method: Method = "exact",
) -> Moments:
    """Mean and variance of ``activation(u)``, u ~ Normal(mean, std^2), elementwise.

    Args:
        activation: a module or function that acts on each element alone. Modules of ``torch.nn``
            that are piecewise polynomial (ReLU, ReLU6, LeakyReLU, Hardswish, ...) are integrated in
            closed form; all others by Gauss-Legendre quadrature on panels.
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
    if method == "quantile":
        result = _by_quantiles(activation, m, s)
    else:
        pieces = pieces_of(activation) if method == "exact" else None
        result = _by_quadrature(activation, m, s) if pieces is None else _by_pieces(pieces, m, s)
    return result[0].to(dtype), result[1].to(dtype)


# Closed form ---------------------------------------------------------------------------------------


def _by_pieces(pieces: Pieces, m: Tensor, s: Tensor) -> Moments:
    """With u = m + s t and t ~ Normal(0, 1), f(u) - f(m) = a0 + a1 t + a2 t^2 on each piece."""
    starts = [start for start, _ in pieces]
    bounds = [_edge_terms(start, m, s) for start in (*starts, math.inf)]
    wide = [tuple(torch.as_tensor(c, dtype=m.dtype, device=m.device) for c in cs) for _, cs in pieces]
    center = wide[0][0] + wide[0][1] * m + wide[0][2] * m * m
    for start, (c0, c1, c2) in zip(starts[1:], wide[1:], strict=True):
        center = torch.where(m >= start, c0 + c1 * m + c2 * m * m, center)
    center = center.detach()  # the moments do not depend on the center
    first = torch.zeros_like(m)
    second = torch.zeros_like(m)
    for (c0, c1, c2), lower, upper in zip(wide, bounds[:-1], bounds[1:], strict=True):
        a0 = c0 + c1 * m + c2 * m * m - center
        a1 = (c1 + 2 * c2 * m) * s
        a2 = c2 * s * s
        t0, t1, t2, t3, t4 = _truncated_moments(lower, upper)
        first = first + a0 * t0 + a1 * t1 + a2 * t2
        second = second + (
            a0 * a0 * t0 + 2 * a0 * a1 * t1 + (a1 * a1 + 2 * a0 * a2) * t2 + 2 * a1 * a2 * t3 + a2 * a2 * t4
        )
    return center + first, (second - first * first).clamp_min(0)


_EdgeTerms = tuple[Tensor, Tensor, Tensor]  # t, Phi(-t), phi(t)


def _edge_terms(edge: float, m: Tensor, s: Tensor) -> _EdgeTerms:
    if math.isinf(edge):  # a constant: differentiating (inf - m) / s would give nan
        t = torch.full_like(m, math.copysign(_REACH, edge))
    else:
        t = ((edge - m) / s).clamp(-_REACH, _REACH)
    return t, torch.special.ndtr(-t), torch.exp(-0.5 * t * t) * (1 / math.sqrt(2 * math.pi))


def _truncated_moments(lower: _EdgeTerms, upper: _EdgeTerms) -> tuple[Tensor, ...]:
    """Integrals of t^k phi(t) between two edges, k = 0 to 4, by parts."""
    (a, a_tail, a_pdf), (b, b_tail, b_pdf) = lower, upper
    # Phi(b) - Phi(a), from the tails on the side where they are small
    t0 = torch.where(a > 0, a_tail - b_tail, torch.special.ndtr(b) - torch.special.ndtr(a))
    t1 = a_pdf - b_pdf
    t2 = t0 + a * a_pdf - b * b_pdf
    t3 = 2 * t1 + a * a * a_pdf - b * b * b_pdf
    t4 = 3 * t2 + a * a * a * a_pdf - b * b * b * b_pdf
    return t0, t1, t2, t3, t4


# Quadrature ----------------------------------------------------------------------------------------

_NODES_PER_PANEL = 8
_PANELS_IN_T = tuple(np.linspace(-9.0, 9.0, 13))  # phi(9) = 1e-18
_PANELS_IN_U = (-40.0, -20.0, -10.0, -5.0, -2.5, -1.0, 0.0, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0)


@functools.cache
def _legendre() -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.legendre.leggauss(_NODES_PER_PANEL)
    return nodes.tolist(), weights.tolist()


def _by_quadrature(f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor) -> Moments:
    """Gauss-Legendre on panels that resolve both the density (in t) and the activation (in u)."""
    edges_in_u = m.new_tensor(sorted({*_PANELS_IN_U, *kinks_of(f)}))
    with torch.no_grad():  # the integral does not depend on where the panels meet
        in_t = m.new_tensor(_PANELS_IN_T).expand(*m.shape, -1)
        in_u = ((edges_in_u - m[..., None]) / s[..., None]).clamp(in_t[..., :1], in_t[..., -1:])
        edges = torch.cat([in_t, in_u], dim=-1).sort(dim=-1).values
        half = (edges[..., 1:] - edges[..., :-1])[..., None] / 2
        nodes, weights = (m.new_tensor(values) for values in _legendre())
        t = (edges[..., :-1, None] + half * (1 + nodes)).flatten(-2)
        w = (half * weights).flatten(-2) * torch.exp(-0.5 * t * t)
        w = w / w.sum(-1, keepdim=True)
    return _weighted_moments(f, m, s, t, w)


def _by_quantiles(f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor) -> Moments:
    """Equal weights at t = Phi^-1((i + 1/2) / 200)."""
    grid = (torch.arange(_QUANTILES, dtype=m.dtype, device=m.device) + 0.5) / _QUANTILES
    t = torch.special.ndtri(grid)
    return _weighted_moments(f, m, s, t, torch.full_like(t, 1 / _QUANTILES))


def _weighted_moments(f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor, t: Tensor, w: Tensor) -> Moments:
    center = f(m[..., None]).detach()
    deviation = f(m[..., None] + s[..., None] * t) - center
    first = (w * deviation).sum(-1)
    second = (w * deviation * deviation).sum(-1)
    return center[..., 0] + first, (second - first * first).clamp_min(0)
