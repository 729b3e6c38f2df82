"""Nodes t and weights w such that E g(t) = sum of w g(t) for a standard normal t."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pn_compiler.operators.activations import has_long_tails, kinks_of, scale_of, strip_of

_QUANTILES = 200  # nodes of the reference implementation

_LEGENDRE = tuple(values.tolist() for values in np.polynomial.legendre.leggauss(8))  # nodes and weights
_PANELS_IN_T = tuple(np.linspace(-9.0, 9.0, 13))  # the density is 1e-18 at 9
_PANELS_IN_U = (-40.0, -20.0, -10.0, -5.0, -2.5, -1.0, 0.0, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0)
_FAR_IN_U = tuple(sign * 80.0 * 2**k for sign in (-1, 1) for k in range(12))  # to 160,000

_SPREAD = 7.0  # standard deviations; the mass beyond is 3e-12
WIDEST_TO_SHARE = 4.0  # above this std, panels take fewer nodes
_MOST_STEPS = 200
_DIGITS = math.log(1e10)


def nodes(f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights for g(t) = f(m + s t): along a new last axis, or [nodes] if all of m share them."""
    strip = strip_to_share(f, s)
    if strip is not None:
        widest = float(s.detach().max()) if s.numel() else 0.0
        steps = _steps(strip, widest) if widest <= WIDEST_TO_SHARE else _MOST_STEPS  # false for nan
        if steps < _MOST_STEPS:
            return _trapezoid(steps, m)
    return _panels(f, m, s)


def strip_to_share(f: Callable[[Tensor], Tensor], s: Tensor) -> float | None:
    """`strip_of(f)` if the largest s may be read; on other devices that would force a synchronization."""
    asked = s.device.type == "cpu" and type(s) is Tensor and not is_transformed()
    return strip_of(f) if asked else None


def is_transformed() -> bool:
    """Whether a compiler or a torch.func transform is tracing, so that no value may be read."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def _steps(strip: float, std: float) -> int:
    """Half the nodes of a trapezoidal rule for f(m + std t), f analytic where |Im u| < `strip`.

    With step h its relative error is about exp(a^2 / 2 - 2 pi a / h) for every a up to strip / std: the
    density grows by the first term in |Im t| < a (Trefethen & Weideman, SIAM Review 2014, theorem 5.1).
    """
    a = math.sqrt(2 * _DIGITS)  # the best a if f has no singularity
    if std > 0:
        a = min(a, 0.95 * strip / std)
    step = 2 * math.pi * a / (a * a / 2 + _DIGITS)
    return math.ceil(_SPREAD / step)


def _trapezoid(steps: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """2 `steps` + 1 equidistant nodes."""
    t = torch.linspace(-_SPREAD, _SPREAD, 2 * steps + 1, dtype=like.dtype, device=like.device)
    w = torch.exp(-0.5 * t * t)
    return t, w / w.sum()


@torch.no_grad()  # the integral does not depend on where the panels meet
def _panels(f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes on panels that resolve both the density (in t) and the activation (in u)."""
    scale, far = scale_of(f), _FAR_IN_U if has_long_tails(f) else ()
    edges_in_u = m.new_tensor(sorted({*(scale * edge for edge in _PANELS_IN_U), *far, *kinks_of(f)}))
    in_t = m.new_tensor(_PANELS_IN_T).expand(*m.shape, -1)
    in_u = ((edges_in_u - m[..., None]) / s[..., None]).clamp(in_t[..., :1], in_t[..., -1:])
    edges = torch.cat([in_t, in_u], dim=-1).sort(dim=-1).values
    half = (edges[..., 1:] - edges[..., :-1])[..., None] / 2
    x, weights = (m.new_tensor(values) for values in _LEGENDRE)
    t = (edges[..., :-1, None] + half * (1 + x)).flatten(-2)
    w = (half * weights).flatten(-2) * torch.exp(-0.5 * t * t)
    return t, w / w.sum(-1, keepdim=True)


def quantiles(like: Tensor) -> tuple[Tensor, Tensor]:
    """Equal weights at t = Phi^-1((i + 1/2) / 200), as in the reference implementation."""
    grid = (torch.arange(_QUANTILES, dtype=like.dtype, device=like.device) + 0.5) / _QUANTILES
    t = torch.special.ndtri(grid)
    return t, torch.full_like(t, 1 / _QUANTILES)
