"""The affine of a site, computed from its four parameters, with a backward of a dozen small products.

Every training step runs this on tensors as small as [C], so its cost is the number of operators. Therefore
several sites can be computed as one, the forward also computes the slopes of the moments (`moments`), and
autograd sees a single function.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pn_compiler.numerics.eager import runs_eagerly
from pn_compiler.numerics.moments import moments, widest_dtype

PARAMETERS = ("weight", "bias", "proxy_weight", "proxy_bias")  # of a site, in the order of their stack


class SiteAffine(NamedTuple):
    """The constants that a site applies, each [C].

    weight, bias: of the normalizer, in the dtype of the parameters, scale included; None for the site's own.
    scale, shift: behind the activation, at least float32. `scale` is None if weight and bias absorbed it.
    """

    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor


def scale_and_shift(parameters: Tensor, activation: nn.Module, proxy_eps: float) -> tuple[Tensor, Tensor]:
    """(r, v) with z = activation * r + v: r = 1/sqrt(var + proxy_eps), v = -mean * r.

    Each [C], in float64 where the device has it. mean and var are the moments of
    activation(weight * p + bias), p ~ Normal(proxy_bias, (1 + proxy_weight)^2).

    Args:
        parameters: those of `PARAMETERS`, [4, C].
    """
    weight, bias, proxy_weight, proxy_bias = parameters.to(widest_dtype(parameters)).unbind()
    std = (weight * (1 + proxy_weight)).abs()
    mean, var, *_ = moments(activation, torch.addcmul(bias, weight, proxy_bias), std)
    scale = torch.rsqrt(var + proxy_eps)
    return scale, -mean * scale


def site_affine(
    parameters: Tensor, activation: nn.Module, proxy_eps: float, *, into_affine: bool
) -> SiteAffine:
    """The affine of one site, or of several side by side.

    Args:
        parameters: as for `scale_and_shift`.
        into_affine: absorb the scale into the normalizer's weight and bias, for a homogeneous activation:
            phi(r u) = r phi(u).
    """
    learns = next(activation.parameters(), None) is not None
    if learns or not torch.is_grad_enabled() or not runs_eagerly(parameters):
        results = _narrow(parameters, *scale_and_shift(parameters, activation, proxy_eps), into_affine)
    else:
        results = _SiteAffine.apply(parameters, activation, proxy_eps, into_affine)  # type: ignore[no-untyped-call]  # torch's
    if into_affine:
        weight, bias, shift = results
        return SiteAffine(weight, bias, None, shift)
    return SiteAffine(None, None, *results)


def _narrow(parameters: Tensor, scale: Tensor, shift: Tensor, into_affine: bool) -> tuple[Tensor, ...]:
    """Scaled weight, scaled bias and shift, or scale and shift, in the dtypes of `SiteAffine`."""
    dtype = torch.promote_types(parameters.dtype, torch.float32)
    if not into_affine:
        return scale.to(dtype), shift.to(dtype)
    weight, bias, *_ = parameters.unbind()
    return (weight * scale).to(weight.dtype), (bias * scale).to(weight.dtype), shift.to(dtype)


class _SiteAffine(torch.autograd.Function):
    """`_narrow(scale_and_shift(...))`, with a gradient from the slopes of the moments."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, activation: nn.Module, proxy_eps: float, into_affine: bool) -> Any:
        parameters = given.to(widest_dtype(given))
        weight, bias, proxy_weight, proxy_bias = parameters.unbind()
        k = 1 + proxy_weight
        s = weight * k
        m = torch.addcmul(bias, weight, proxy_bias)
        mean, var, mean_by, var_by = moments(activation, m, s.abs(), slopes=True)
        assert mean_by is not None
        assert var_by is not None
        scale = torch.rsqrt(var + proxy_eps)
        # d scale = -1/2 scale^3 d var and d shift = -scale d mean - mean d scale, here without -1/2 and -1
        by_scale = scale * scale * scale * var_by
        by_shift = torch.addcmul(mean_by * scale, mean, by_scale, value=-0.5)
        ctx.save_for_backward(given, parameters, k, s, scale, by_scale, by_shift)
        ctx.options = activation, proxy_eps, into_affine
        return _narrow(given, scale, -mean * scale, into_affine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        given, parameters, k, s, scale, by_scale, by_shift = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True, but the slopes are not differentiable
            activation, proxy_eps, into_affine = ctx.options
            pair = scale_and_shift(given, activation, proxy_eps)
            outputs = _narrow(given, *pair, into_affine)
            return *torch.autograd.grad(outputs, given, gradients, create_graph=True), None, None, None
        weight, bias, _, proxy_bias = parameters.unbind()
        *of_affine, of_shift = (g.to(scale.dtype) for g in gradients)
        of_scale = (
            torch.addcmul(of_affine[0] * weight, of_affine[1], bias) if ctx.options[-1] else of_affine[0]
        )
        by_m, by_s = torch.add(of_scale * by_scale, of_shift * by_shift, alpha=2).mul_(-0.5).unbind()
        by_s = by_s * s.sign()  # of weight * k; the moments are those of its magnitude
        of_weight, of_bias = torch.addcmul(by_m * proxy_bias, by_s, k), by_m
        if ctx.options[-1]:
            of_weight, of_bias = (
                torch.addcmul(own, g, scale) for own, g in zip((of_weight, of_bias), of_affine, strict=True)
            )
        result = torch.stack((of_weight, of_bias, by_s * weight, by_m * weight)).to(given.dtype)
        return result, None, None, None
