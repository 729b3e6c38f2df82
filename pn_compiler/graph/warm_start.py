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

    Exact where each instance's statistics equal the population's, whatever the anchor. With BatchNorm's
    g (x - mu) / sd + b, sd^2 = var + eps, and M and V of the group that holds c::

        weight_c = g_c sqrt(V + eps) / sd_c        bias_c = b_c + g_c (M - mu_c) / sd_c
    """
    g, b = plain_affine(norm)
    if not has_values(g):
        return g, b  # there are no values to compute with
    assert norm.running_mean is not None
    assert norm.running_var is not None
    m, v = (t.repeat_interleave(norm.num_features // num_groups) for t in population(norm, num_groups))
    sd = (norm.running_var.double() + norm.eps).sqrt()
    return g * (v + norm.eps).sqrt() / sd, b + g * (m - norm.running_mean.double()) / sd


def population(norm: _BatchNorm, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, [G], float64, of each group of channels in a population with the running statistics.

    Over the channels k of a group::

        M = mean_k(mu_k)        V = mean_k(var_k + mu_k^2) - M^2
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mu, var = (t.double().view(num_groups, -1) for t in (norm.running_mean, norm.running_var))
    m = mu.mean(1, keepdim=True)
    # written as a sum of two nonnegative terms
    return m.view(-1), (var + (mu - m) ** 2).mean(1)
