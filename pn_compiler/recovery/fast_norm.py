"""The normalizers with constant statistics, computed for training in half of the passes over memory."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pn_compiler.nn import Normalizer
from pn_compiler.numerics.affine import per_channel


@contextlib.contextmanager
def fast_norms(model: nn.Module) -> Iterator[None]:
    """Lets the sites of `model` with "anchored" and "rms" statistics run as one operation with a gradient.

    Composed of operators, as `Normalizer` has it for tracing and for gradients of gradients, a site reads and
    writes its activations three times as often: docs/distillation.md.
    """
    with contextlib.ExitStack() as stack:
        for norm in model.modules():
            if isinstance(norm, Normalizer) and norm.statistics != "group" and "normalize" not in vars(norm):
                vars(norm)["normalize"] = functools.partial(_normalize, norm, norm.normalize)
                stack.callback(vars(norm).pop, "normalize")
        yield


def _normalize(
    norm: Normalizer, plain: Any, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`Normalizer.normalize`, which `plain` is."""
    alike = weight is not None and bias is not None and x.dtype == weight.dtype == bias.dtype
    if not alike or x.dim() < 3 or x.dtype not in (torch.float32, torch.float64):
        return plain(x, weight, bias)  # type: ignore[no-any-return]
    var, anchor, mean = norm.constants()
    # over all values of a group: s sum(d^2) + c
    count = x[0].numel() // norm.num_groups
    share, constant = ((1 - anchor) / count).to(x), (anchor * var + norm.eps).to(x)
    center = None if mean is None else mean.to(x)
    return _AnchoredNorm.apply(x, weight, bias, center, share, constant)  # type: ignore[no-any-return, no-untyped-call]


class _AnchoredNorm(torch.autograd.Function):
    """y = weight d r + bias with d = x - center, or minus the group's mean, and r = (s sum(d^2) + c)^-1/2.

    With g the gradient of y and sums over one instance and group, that of x is g weight r - s r^3 d
    sum(g weight d), without its mean if the group's mean was subtracted.

    Args:
        x: [N, C, *].
        weight, bias: [C].
        center: [G] or None.
        share, constant: s and c, [G].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        center: Tensor | None,
        share: Tensor,
        constant: Tensor,
    ) -> Tensor:
        groups = len(share)
        space = tuple(range(2, x.dim()))
        ctx.centered, ctx.groups = center is None, groups
        if center is None:
            size = x[0].numel() // groups
            d = x - _as_map(_spread(_group_sums(x.mean(space), groups) * (x[0, 0].numel() / size), x), x)
        else:
            d = x - _as_map(_spread(center[None], x), x)
        squares = torch.linalg.vector_norm(d, dim=space).square()  # without a map of squares
        r = torch.rsqrt(share * _group_sums(squares, groups) + constant)  # [N, G]
        factor = _spread(r, x) * weight
        ctx.save_for_backward(d, weight, r, share)
        return torch.addcmul(per_channel(bias, x), d, _as_map(factor, x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        d, weight, r, share = ctx.saved_tensors
        space = tuple(range(2, d.dim()))
        sums = g.sum(space)  # [N, C]
        products = (g * d).sum(space)
        scale = _spread(r, d)
        k = -share * r.pow(3) * _group_sums(products * weight, ctx.groups)
        dx = torch.addcmul(g * _as_map(scale * weight, d), d, _as_map(_spread(k, d), d))
        if ctx.centered:
            size = d[0].numel() // ctx.groups
            dx -= _as_map(_spread(_group_sums(sums * scale * weight, ctx.groups) / size, d), d)
        return dx, (products * scale).sum(0), sums.sum(0), None, None, None


def _group_sums(values: Tensor, groups: int) -> Tensor:
    """[N, C] -> [N, G]"""
    return values.reshape(len(values), groups, -1).sum(2)


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """[N, G] -> [N, C], C the channels of `x`."""
    return values.repeat_interleave(x.shape[1] // values.shape[1], 1)


def _as_map(values: Tensor, x: Tensor) -> Tensor:
    """[N, C] -> [N, C, 1, ...], to broadcast against `x`."""
    return values.reshape(*values.shape, *[1] * (x.dim() - 2))
