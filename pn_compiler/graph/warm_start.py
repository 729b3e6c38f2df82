"""Weight and bias of a normalizer that computes what a trained BatchNorm computed."""

import dataclasses

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pn_compiler.base.config import WarmStart
from pn_compiler.inspection.fake_tensors import has_values

LARGE_RESIDUAL = 0.1  # residuals above it are reported


@dataclasses.dataclass(frozen=True, slots=True)
class Calibrated:
    """The calibration result for one normalizer.

    Attributes:
        weight, bias: float64 [C].
        residual: mean square deviation from the BatchNorm's output, relative to its variance.
    """

    weight: Tensor
    bias: Tensor
    residual: float


def is_trained(norm: _BatchNorm) -> bool:
    """Whether the running statistics have moved from their initial values, mean 0 and variance 1."""
    if norm.running_mean is None or norm.running_var is None:
        return False
    if not has_values(norm.running_mean):
        return True  # there are no values to look at: treated as a trained network
    return bool((norm.running_mean != 0).any() or (norm.running_var != 1).any())


def is_warm(norm: _BatchNorm, mode: WarmStart) -> bool:
    """Whether `norm` gets a warm start in this mode of `transform`."""
    return mode in ("running_stats", "calibrate") or (mode == "auto" and is_trained(norm))


def plain_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The unchanged (weight, bias) of `norm`, [C]; ones and zeros if it has none."""
    device = next((t.device for t in (*norm.parameters(), *norm.buffers())), None)
    weight = torch.ones(norm.num_features, device=device, dtype=torch.float64)
    bias = torch.zeros_like(weight)
    if norm.affine:
        weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    return weight, bias


def affine_from_running_stats(norm: _BatchNorm, num_groups: int) -> tuple[Tensor, Tensor]:
    """(weight, bias), [C], float64, with which a normalizer of `num_groups` groups replaces `norm`.

    Exact where each instance's statistics equal the population's. With BatchNorm's
    g (x - mu) / sd + b, sd^2 = var + eps, over the channels k of the group that holds c::

        M = mean_k(mu_k)        V = mean_k(sd_k^2 + mu_k^2) - M^2
        weight_c = g_c sqrt(V) / sd_c        bias_c = b_c + g_c (M - mu_c) / sd_c
    """
    g, b = plain_affine(norm)
    if not has_values(g):
        return g, b  # there are no values to compute with
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mu = norm.running_mean.double()
    sd2 = norm.running_var.double() + norm.eps
    grouped_mu, grouped_sd2 = mu.view(num_groups, -1), sd2.view(num_groups, -1)
    m = grouped_mu.mean(1, keepdim=True)
    # mean(sd^2 + mu^2) - M^2, written as a sum of two nonnegative terms
    v = (grouped_sd2 + (grouped_mu - m) ** 2).mean(1, keepdim=True)
    m, v = (t.expand_as(grouped_mu).reshape(-1) for t in (m, v))
    sd = sd2.sqrt()
    return g * v.sqrt() / sd, b + g * (m - mu) / sd
