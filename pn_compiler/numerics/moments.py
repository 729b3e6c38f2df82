"""Mean and variance of an activation under a Gaussian: the proxy statistics.

u ~ Normal(mean, std^2). Everything is computed in float64 where the device has it, because the variance is
a difference.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import one_of
from pn_compiler.numerics.piecewise_moments import Moments, by_pieces
from pn_compiler.numerics.quadrature import WIDEST_TO_SHARE, nodes, quantiles, strip_to_share
from pn_compiler.operators.activations import has_jumps, pieces_of

Method = Literal["exact", "quantile", "quadrature"]

_TINY = 1e-20  # lower bound of std, so that the moments and their gradients stay finite at 0
_TINY_BESIDE_NODES = 1e-7  # the same where slopes are quotients; f hardly bends within it


def proxy_moments(
    activation: Callable[[Tensor], Tensor],
    mean: Tensor,
    std: Tensor,
    *,
    method: Method = "exact",
) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``activation(u)``, u ~ Normal(mean, std^2), elementwise.

    Args:
        activation: an elementwise module or function. Modules of ``torch.nn`` that are piecewise
            polynomial (ReLU, ReLU6, LeakyReLU, Hardswish, ...) are integrated in closed form; all
            others by quadrature.
        mean: mean of u, any shape.
        std: standard deviation of u, not negative, broadcastable with `mean`; may be 0.
        method: "exact" (closed form where there is one, else quadrature), "quadrature" (always), or
            "quantile" (the mean over the 200 mid-quantile nodes of the reference implementation, with
            errors of up to 3 %, for networks trained with it).

    Returns:
        (mean, variance) of the activation, in the broadcast shape of the arguments and their dtype, but at
        least float32.

    Raises:
        ConfigError: `method` is unknown.

    Source: Labatie et al., NeurIPS 2021, section 5, and its public reference implementation.
    """
    one_of("method", method, get_args(Method))
    if not callable(activation) or isinstance(activation, type):
        raise ConfigError(f"activation={activation!r:.80}: expected a module or function")
    for name, value in {"mean": mean, "std": std}.items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"{name}={value!r:.80}: expected a tensor")
    dtype = torch.promote_types(torch.promote_types(mean.dtype, std.dtype), torch.float32)
    wide = widest_dtype(mean)
    m, s = torch.broadcast_tensors(mean.to(wide), std.to(wide))  # type: ignore[no-untyped-call]  # torch's
    result = moments(activation, m, s, method)
    return result.mean.to(dtype), result.var.to(dtype)


def widest_dtype(tensor: Tensor) -> torch.dtype:
    """float64 on devices that have it, else float32."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def moments(
    f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor, method: Method = "exact", *, slopes: bool = False
) -> Moments:
    """`proxy_moments` without checks and casts; with `slopes`, autograd cannot differentiate it."""
    s = s.clamp_min(_TINY)
    pieces = pieces_of(f) if method == "exact" else None
    if pieces is not None:
        return by_pieces(pieces, m, s, slopes=slopes)
    if slopes or has_jumps(f):
        s = s.clamp_min(_TINY_BESIDE_NODES)
    if method == "quantile":
        return _by_nodes(f, m, s, *quantiles(m), slopes=slopes)
    return _by_quadrature(f, m, s, slopes=slopes)


# Quadrature ----------------------------------------------------------------------------------------


def _by_quadrature(f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor, *, slopes: bool) -> Moments:
    if m.dim() == 1 and not torch.is_grad_enabled() and strip_to_share(f, s) is not None:
        far = s > WIDEST_TO_SHARE
        if far.any() and not far.all():  # else one wild channel would cost many nodes in all of them
            parts = [(mask, _by_quadrature(f, m[mask], s[mask], slopes=slopes)) for mask in (~far, far)]
            return _merged(parts, len(m))
    t, w = nodes(f, m, s)
    if torch.is_grad_enabled() and has_jumps(f):
        # the slope of f misses a jump, but the density at fixed u does not; the values are the same
        u = (m[..., None] + s[..., None] * t).detach()
        moving = (u - m[..., None]) / s[..., None]
        w = w * torch.exp((t * t - moving * moving) / 2) * (s.detach() / s)[..., None]
        return _by_nodes(f, m.detach(), s.detach(), t, w, slopes=slopes)
    return _by_nodes(f, m, s, t, w, slopes=slopes)


def _merged(parts: list[tuple[Tensor, Moments]], size: int) -> Moments:
    """Joins the moments of parts of the last axis."""
    (_, first), *_ = parts
    merged = [None if field is None else field.new_empty(*field.shape[:-1], size) for field in first]
    for mask, part in parts:
        for whole, field in zip(merged, part, strict=True):
            if whole is not None and field is not None:
                whole[..., mask] = field
    mean, var, mean_by, var_by = merged
    assert mean is not None
    assert var is not None
    return Moments(mean, var, mean_by, var_by)


def _by_nodes(
    f: Callable[[Tensor], Tensor], m: Tensor, s: Tensor, t: Tensor, w: Tensor, *, slopes: bool
) -> Moments:
    """Sums over the last axis. Slopes need no f': d/dm E f = E f t / s and d/ds E f = E f (t^2 - 1) / s."""
    center = f(m.clone()).detach()  # f may work in place; any center gives the same mean and variance
    g = f(m[..., None] + s[..., None] * t) - center[..., None]
    weights = [w, w * t, w * (t * t - 1)] if slopes else [w]
    mean, *mean_by = _weighted(g, weights)
    square, *square_by = _weighted(g * g, weights)
    var = torch.addcmul(square, mean, mean, value=-1).clamp_min(0)
    if not slopes:
        return Moments(center + mean, var)
    of_mean = torch.stack(mean_by) / s
    return Moments(
        center + mean, var, of_mean, torch.addcmul(torch.stack(square_by) / s, mean, of_mean, value=-2)
    )


def _weighted(values: Tensor, weights: list[Tensor]) -> Sequence[Tensor]:
    """The sum of weights * values over the last axis, for each of `weights`."""
    if weights[0].dim() == 1:
        return (values @ torch.stack(weights, dim=1)).unbind(-1)
    return [(w * values).sum(-1) for w in weights]
