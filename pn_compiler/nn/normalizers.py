"""Normalizers whose statistics know the population that the network was trained on.

`Normalizer` is what the sites of a converted network have in common; `AnchoredNorm` is a site without an
activation, and `FoldedNorm` what `pn_compiler.fold` makes of it if no ``nn.GroupNorm`` computes the same. All
are leaves for torch.fx.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.numerics.affine import channel_affine, per_channel
from pn_compiler.numerics.anchored_norm import Population, anchored_norm

_NOT_CONVERTED = (
    "this is a checkpoint of the network with BatchNorm: load "
    "pn_compiler.convert_state_dict(state_dict, model) into the converted one"
)
Statistics = Literal["group", "anchored", "rms"]


class Normalizer(nn.Module):
    """Normalizes over groups of channels, with weight and bias; `normalize` computes it.

    With m and v the mean and variance over [C / G, *] of one instance and group, M and V those of the
    population, and b the anchor, three kinds of statistics (docs/method.md)::

        "group"       (x - m) / sqrt(v + eps)                                        GroupNorm
        "anchored"    (x - m) / sqrt((1 - b) v + b V + eps)
        "rms"         (x - M) / sqrt((1 - b) E[(x - M)^2] + b V + eps)               E over [C / G, *], too

    With b = 0 nothing of V is left; "rms" with b = 1 is a BatchNorm as it is evaluated.

    Args:
        num_groups: G; 1 is LayerNorm over [C, *], C is InstanceNorm.
        num_channels: C.
        eps: added to the variance.
        statistics: one of the three.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Parameters: ``weight`` and ``bias``, [C].
    Buffers: ``population_mean`` (M, "rms" only), ``population_var`` (V) and ``anchor`` (b), each [G]; "group"
        has none. They start as 0, 1 and 0.
    """

    population_mean: Tensor | None
    population_var: Tensor | None
    anchor: Tensor | None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        *,
        statistics: Statistics = "group",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ConfigError(f"num_groups={num_groups} does not divide num_channels={num_channels}")
        if statistics not in get_args(Statistics):
            raise ConfigError(f"statistics={statistics!r}: expected one of {get_args(Statistics)}")
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.statistics: Statistics = statistics
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))
        zeros, has = torch.zeros(num_groups, device=device, dtype=dtype), statistics != "group"
        self.register_buffer("population_mean", zeros if statistics == "rms" else None)
        self.register_buffer("population_var", torch.ones_like(zeros) if has else None)
        self.register_buffer("anchor", torch.zeros_like(zeros) if has else None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets weight to 1 and bias to 0. The population stays: it is no parameter."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def normalize(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """weight * normalized x + bias, in the dtype of `x`; both [C] or None.

        Statistics of half precision are computed in float32.
        """
        if self.population_var is None or self.anchor is None:
            return F.group_norm(straightened(x), self.num_groups, weight, bias, self.eps)
        population = Population(self.population_mean, self.population_var, self.anchor)
        return anchored_norm(x, self.num_groups, weight, bias, population, self.eps)

    def share_population(self, other: "Normalizer") -> None:
        """Takes M, V and b of `other`, which may be attributes that are no buffers: opacus needs that."""
        for name in ("population_mean", "population_var", "anchor"):
            setattr(self, name, getattr(other, name))

    def constants(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(V, b, M) in float64, [G] each; M is None if the instance's mean is subtracted."""
        assert self.population_var is not None
        assert self.anchor is not None
        mean = None if self.population_mean is None else self.population_mean.double()
        return self.population_var.double(), self.anchor.double(), mean

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As of any module; entries of a BatchNorm, whose weight means something else, are an error."""
        if f"{prefix}running_var" in state_dict and _NOT_CONVERTED not in error_msgs:
            error_msgs.append(_NOT_CONVERTED)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _describe(self) -> str:
        return "" if self.statistics == "group" else f", statistics={self.statistics!r}"


class AnchoredNorm(Normalizer):
    """A site without an activation, whose statistics are "anchored" or "rms": see `Normalizer`.

    Shape: input is [N, C, *], and so is the result, in its dtype.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        *,
        statistics: Statistics = "rms",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, statistics=statistics, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that callers of BatchNorm know
        return self.normalize(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}{self._describe()}"


class FoldedNorm(nn.Module):
    """An `AnchoredNorm` at inference, with all that is constant folded::

        y = weight (x - c) / sqrt(share E[(x - c)^2] + var) + bias        E over [C / G, *] of one instance

    Args:
        num_groups: G.
        num_channels: C.
        centered: whether c is the mean of the instance's group, and E its variance. Else it is `shift`.
        share: [G]; None is 1.
        var: [G].
        shift: [C]; None is 0.
        weight: [C]; None is 1, and costs nothing.
        bias: [C]; None is 0, likewise.
    """

    weight: Tensor  # None without, as those of nn.GroupNorm
    bias: Tensor
    share: Tensor | None
    var: Tensor
    shift: Tensor | None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        centered: bool,
        share: Tensor | None,
        var: Tensor,
        shift: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.num_groups, self.num_channels, self.centered = num_groups, num_channels, centered
        for name, values in (("weight", weight), ("bias", bias)):
            self.register_parameter(name, None if values is None else nn.Parameter(values))
        self.register_buffer("share", share)
        self.register_buffer("var", var)
        self.register_buffer("shift", shift)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that callers of BatchNorm know
        return self.normalize(input, self.weight, self.bias)

    def normalize(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """weight * normalized x + bias; both [C] or None."""
        if self.shift is not None:
            x = x - per_channel(self.shift, x)
        # each operator treats all elements of a group alike, in a file, too: onnxruntime may reorder them
        size = self.num_channels // self.num_groups
        grouped = x.reshape(x.shape[0], self.num_groups, size, math.prod(x.shape[2:]))
        if self.centered:
            grouped = grouped - _mean_of_groups(grouped)
        squares = _mean_of_groups(grouped * grouped)
        if self.share is not None:
            squares = squares * self.share.view(-1, 1, 1)
        y = (grouped * torch.rsqrt(squares + self.var.view(-1, 1, 1))).reshape(x.shape)
        return channel_affine(y, weight, bias)

    def constant_scale(self, mean: Tensor, var: Tensor) -> Tensor:
        """weight / sqrt(share V + var), [C] float64, V of inputs with these moments per channel, [C]."""
        mean, share = mean.double(), 1.0 if self.share is None else self.share.double().cpu()
        grouped = mean.view(self.num_groups, -1)
        if self.centered:
            center = grouped.mean(1, keepdim=True)
        else:
            center = torch.zeros(1) if self.shift is None else self.shift.double().cpu().view_as(grouped)
        spread = (var.view_as(grouped) + (grouped - center) ** 2).mean(1)
        deviation = (share * spread + self.var.double().cpu()).sqrt()
        weight = torch.ones(1) if self.weight is None else self.weight.double().cpu()
        return weight / deviation.repeat_interleave(self.num_channels // self.num_groups)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, centered={self.centered}"


def straightened(x: Tensor) -> Tensor:
    """`x`, as group_norm takes it: on a CPU torch 2.13 crashes in the backward of some channels_last ones."""
    crashes = torch.is_grad_enabled() and not x.requires_grad and x.device.type == "cpu"
    return x.contiguous() if crashes else x


def _mean_of_groups(grouped: Tensor) -> Tensor:
    """Means over each group of [N, G, C / G, S], [N, G, 1, 1], in two stages, as those of `anchored_norm`."""
    return grouped.mean(3, keepdim=True).mean(2, keepdim=True)


def normalize(
    norm: "nn.GroupNorm | Normalizer | FoldedNorm",
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """weight * normalized x + bias, with the statistics of a site, folded or not; both [C] or None."""
    if not isinstance(norm, nn.GroupNorm):
        return norm.normalize(x, weight, bias)
    return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
