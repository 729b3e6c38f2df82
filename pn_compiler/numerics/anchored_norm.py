"""The normalizers with constant statistics: weight (x - m) / sqrt((1 - b) E[(x - m)^2] + b V + eps) + bias.

Composed of operators, it reads and writes its activations three times as often as GroupNorm does. In eager
mode it therefore runs as one operation, whose backward is the kernel of GroupNorm.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pn_compiler.numerics.affine import per_channel
from pn_compiler.numerics.eager import runs_eagerly

_LEAST_SHARE = 1e-16  # of an instance's variance, for an anchor of 1: far below rounding


class Population(NamedTuple):
    """M, V and b, [G] each. Without M, the mean of the instance's group is subtracted."""

    mean: Tensor | None
    var: Tensor
    anchor: Tensor


def anchored_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    population: Population,
    eps: float,
) -> Tensor:
    """weight * normalized x + bias, in the dtype of `x`, computed in at least float32.

    Args:
        x: [N, C, *].
        weight, bias: [C] or None.
        population: that of each group.
        eps: added to the variance.
    """
    if _can_fuse(x, weight, bias, population):
        return _AnchoredNorm.apply(x, weight, bias, *population, eps)  # type: ignore[no-any-return, no-untyped-call]  # torch's
    return _composed(x, num_groups, weight, bias, population, eps)


def _can_fuse(x: Tensor, weight: Tensor | None, bias: Tensor | None, population: Population) -> bool:
    wide = _wide(x.dtype)
    return (
        runs_eagerly(x, weight, bias, *population)
        and x.dim() > 2
        and x.numel() > 0
        and x.device.type in ("cpu", "cuda")  # whose GroupNorm is known to compute what is asked here
        and all(v is None or torch.promote_types(v.dtype, wide) == wide for v in (weight, bias))
        and not any(values is not None and values.requires_grad for values in population)
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _composed(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    population: Population,
    eps: float,
) -> Tensor:
    wide = x.to(_wide(x.dtype))
    mean, var, anchor = (
        None if values is None else _per_group(values, wide, num_groups) for values in population
    )
    assert var is not None
    assert anchor is not None
    d = wide - (group_means(wide, num_groups) if mean is None else mean)
    factor = torch.rsqrt((1 - anchor) * group_means(d * d, num_groups) + (anchor * var + eps))
    if weight is not None:
        factor = factor * per_channel(weight, d)  # one product less of the size of x
    return (d * factor if bias is None else d * factor + per_channel(bias, d)).to(x.dtype)


def _per_group(values: Tensor, x: Tensor, num_groups: int) -> Tensor:
    """`values` [G] in dtype and shape to broadcast against `x`, without asking a tracer anything."""
    if num_groups > 1:
        values = values.repeat_interleave(x.shape[1] // num_groups)
    return values.to(x).view(-1, *[1] * (x.dim() - 2))


def group_means(x: Tensor, num_groups: int) -> Tensor:
    """Means of x [N, C, *] over each group of an instance, [N, 1 or C, 1, ...].

    They are taken over each channel, then over the group: no sum is long, and any memory format will do.
    """
    means = x.mean(tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x
    if num_groups == 1:
        return means.mean(1, keepdim=True)
    grouped = means.reshape(x.shape[0], num_groups, x.shape[1] // num_groups)
    return grouped.mean(2, keepdim=True).expand_as(grouped).reshape(means.shape)


class _AnchoredNorm(torch.autograd.Function):
    """GroupNorm with an epsilon e for each group, weight / q, and, if there is one, the population's mean M::

        weight d / sqrt((1 - b) E[d^2] + b V + eps) = (weight / q) d / sqrt(E[d^2] + e)        d = x - m
        q = sqrt(1 - b),   e = (b V + eps) / (1 - b)

    So the kernel of GroupNorm computes the gradients, from weight / q, m and r = 1 / sqrt(E[d^2] + e). From
    that of x it also subtracts the mean of g weight r over the group, which is right if m is the instance's
    mean. If m is M, it is added again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor,
        anchor: Tensor,
        eps: float,
    ) -> Tensor:
        x, space, groups = given.to(_wide(given.dtype)), tuple(range(2, given.dim())), len(var)
        b, v = _value(anchor, x), _value(var, x)
        share = max(1 - b, _LEAST_SHARE) if isinstance(b, float) else (1 - b).clamp_min(_LEAST_SHARE)
        per_q = _of_channels(share**-0.5, x)
        scaled = per_q * (x.new_ones(x.shape[1]) if weight is None else weight.to(x))
        center = _group_means(x.mean(space), groups) if mean is None else _value(mean, x)
        d = x - _as_map(center, x)
        norms = torch.linalg.vector_norm(d, dim=space)  # not a map of squares; per channel: no sum is long
        squares = _group_sums(norms.square_(), groups)
        count = math.prod(x.shape[1:]) // groups
        r = squares.mul_(1 / count).add_((b * v + eps) / share).rsqrt_()  # [N, G]
        y = d.mul_(_as_map(_of_channels(r, x) * scaled, x))
        if bias is not None:
            y.add_(_as_map(bias, x))
        ctx.save_for_backward(given, weight, bias, mean, var, anchor, scaled, r)
        ctx.eps, ctx.center, ctx.per_q, ctx.count = eps, center, per_q, count
        result: Tensor = y.to(given.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the kernel has no derivative
            return *_differentiable_backward(ctx, *gradients), *[None] * 4
        given, weight, bias, mean, *_, scaled, r = ctx.saved_tensors
        x, groups = given.to(r.dtype), r.shape[1]
        x = x.contiguous(memory_format=(layout := _layout(x)))
        g = gradients[0].to(r.dtype).contiguous(memory_format=layout)
        center = ctx.center
        center = (
            center.expand_as(r).contiguous() if isinstance(center, Tensor) else r.new_full(r.shape, center)
        )
        (samples, channels), pixels = x.shape[:2], math.prod(x.shape[2:])
        kernel = torch.ops.aten.native_group_norm_backward.default
        dx, dweight, _ = kernel(
            g, x, center, r, scaled, samples, channels, pixels, groups, (True, True, False)
        )
        sums = g.sum(tuple(range(2, x.dim())))  # [N, C]
        if mean is not None:
            of_groups = torch.mv(sums, scaled)[:, None] if groups == 1 else _group_sums(sums * scaled, groups)
            dx.add_(_as_map(of_groups.mul_(r), x), alpha=1 / ctx.count)
        _, of_weight, of_bias, *_ = ctx.needs_input_grad
        return (
            dx.to(given.dtype),
            (dweight * ctx.per_q).to(weight.dtype) if of_weight else None,
            sums.sum(0).to(bias.dtype) if of_bias else None,
            *[None] * 4,
        )


def _differentiable_backward(ctx: Any, gradient: Tensor) -> list[Tensor | None]:
    x, weight, bias, mean, var, anchor, _, _ = ctx.saved_tensors
    asked = ctx.needs_input_grad[:3]
    y = _composed(x, len(var), weight, bias, Population(mean, var, anchor), ctx.eps)
    leaves = [leaf for leaf, needed in zip((x, weight, bias), asked, strict=True) if needed]
    found = iter(torch.autograd.grad(y, leaves, gradient, create_graph=True))
    return [next(found) if needed else None for needed in asked]


def _value(values: Tensor, like: Tensor) -> float | Tensor:
    """A single one as a number, which is no operator, unless that waits for a device."""
    if len(values) == 1 and values.device.type == "cpu":
        return values.item()
    return values.to(like)


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format of `x` that the kernel of GroupNorm would read."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = formats.get(x.dim())
    if (
        x.device.type == "cpu"
        and dense is not None
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=dense)
    ):
        return dense
    return torch.contiguous_format


def _group_sums(values: Tensor, groups: int) -> Tensor:
    """[N, C] -> [N, G]"""
    return values.view(values.shape[0], groups, -1).sum(2)


def _group_means(values: Tensor, groups: int) -> Tensor:
    """[N, C] -> [N, G]"""
    return values.view(values.shape[0], groups, -1).mean(2)


def _of_channels(values: Any, x: Tensor) -> Any:
    """[*, G] -> [*, C], C the channels of `x`; [*, 1] and a number stay."""
    if isinstance(values, float) or values.shape[-1] in (1, x.shape[1]):
        return values
    return values.repeat_interleave(x.shape[1] // values.shape[-1], -1)


def _as_map(values: Any, x: Tensor) -> Any:
    """[G], [C], [N, G] or [N, C] in the shape to broadcast against `x`; a number stays."""
    if isinstance(values, float):
        return values
    values = _of_channels(values, x)
    return values.view(*values.shape, *[1] * (x.dim() - 2))
