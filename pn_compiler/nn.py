"""Modules of a converted network.

`ProxyNormAct` is a site: normalizer + activation + proxy normalization. The ``InputAffine*`` modules
are its consumers: linear operators that take in the site's scale and shift. All are leaves for
torch.fx, so that a converted graph holds modules only and pickles.
"""

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.activations import clip_bounds, is_homogeneous
from pn_compiler.errors import ConfigError
from pn_compiler.moments import is_transformed, proxy_moments

if TYPE_CHECKING:
    from collections.abc import Callable

Output = Literal["output", "activation", "scale", "shift", "affine"]


class ProxyNormAct(nn.Module):
    """Group normalization, activation and proxy normalization of the activation.

    With y = normalizer(x) and phi the activation, per channel c::

        z_c = (phi(weight_c * y_c + bias_c) - mean_c) / sqrt(var_c + proxy_eps)

    where mean_c and var_c are the moments of phi(weight_c * p + bias_c) under the proxy
    distribution p ~ Normal(proxy_bias_c, (1 + proxy_weight_c)^2). They depend on parameters only.

    Args:
        num_groups: groups of the normalizer: 1 is LayerNorm over [C, *], C is InstanceNorm.
        num_channels: C.
        activation: an elementwise module; see `pn_compiler.proxy_moments` for which are exact.
        eps: added to the variance of the normalizer.
        proxy_eps: added to the variance of the activation under the proxy distribution.
        outputs: what forward returns, a tensor if one name is given, else a tuple in this order.
            "output" is z. The others let the consumers take in the affine z = activation * scale +
            shift: "activation" is phi(...), already scaled if a positive scale commutes with phi
            (then "scale" is None); "scale" and "shift" have shape [C]; "affine" is weight * y + bias.
        device, dtype: of the parameters.

    Parameters: ``weight``, ``bias``, ``proxy_weight``, ``proxy_bias``, each [C].

    Shape: x is [N, C, *]; "output", "activation" and "affine" have the same shape.

    Source: Labatie et al., NeurIPS 2021 (arXiv 2106.03743), section 5.
    """

    _held: tuple[list[Tensor], tuple[Tensor, Tensor]] | None = None  # parameters, their scale and shift

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        activation: nn.Module,
        eps: float = 1e-5,
        proxy_eps: float = 0.03,
        *,
        outputs: tuple[Output, ...] = ("output",),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ConfigError(f"num_groups={num_groups} does not divide num_channels={num_channels}")
        unknown = set(outputs) - set(get_args(Output))
        if unknown or not outputs:
            raise ConfigError(f"outputs={outputs!r}: expected names out of {get_args(Output)}")
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.proxy_eps = proxy_eps
        self.outputs: tuple[Output, ...] = outputs
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
        self.proxy_weight = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
        self.proxy_bias = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight 1, bias 0, and a standard normal proxy distribution."""
        nn.init.ones_(self.weight)
        for parameter in (self.bias, self.proxy_weight, self.proxy_bias):
            nn.init.zeros_(parameter)

    def scale_and_shift(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(r, v) with z = activation * r + v: r = 1/sqrt(var + proxy_eps), v = -mean * r.

        Each has shape [C], in `dtype`, or else float32 or wider whatever the parameters are.
        """
        dtype = dtype or torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        # weight * p + bias is Normal(weight * proxy_bias + bias, (weight * (1 + proxy_weight))^2)
        mean, var = proxy_moments(
            self.activation,
            weight * self.proxy_bias + bias,
            (weight * (1 + self.proxy_weight)).abs(),
        )
        scale = torch.rsqrt(var + self.proxy_eps)
        return scale, -mean * scale

    def _held_scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """`scale_and_shift`, not computed again in evaluation if no parameter has changed its values.

        On a CPU comparing them costs a tenth of the moments; elsewhere it would wait for the device.
        """
        parameters = list(self.parameters())
        plain = all(type(p) is nn.Parameter and p.device.type == "cpu" for p in parameters)
        if self.training or torch.is_grad_enabled() or is_transformed() or not plain:
            return self.scale_and_shift()
        if self._held is None or not all(map(_identical, parameters, self._held[0])):
            self._held = ([p.detach().clone() for p in parameters], self.scale_and_shift())
        return self._held[1]

    @property
    def scales_affine(self) -> bool:
        """Whether r is put into weight and bias: phi(r u) = r phi(u), and u itself is not wanted."""
        return is_homogeneous(self.activation) and "affine" not in self.outputs

    def _activate(self, affine: Tensor) -> Tensor:
        """The activation of `affine`; a clip in place, if nobody else reads it: new memory costs more."""
        shared = "affine" in self.outputs or self.activation._forward_hooks
        bounds = None if shared else clip_bounds(self.activation)
        if bounds is None:
            result: Tensor = self.activation(affine)
            return result
        return F.relu_(affine) if bounds == (0, math.inf) else F.hardtanh_(affine, *bounds)

    def forward(self, x: Tensor) -> Any:
        scale, shift = self._held_scale_and_shift()
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        remaining: Tensor | None = scale
        if self.scales_affine:
            weight, bias = (weight * scale).to(weight.dtype), (bias * scale).to(bias.dtype)
            remaining = None
        affine = F.group_norm(x, self.num_groups, weight, bias, self.eps)
        activation = self._activate(affine)
        compute: dict[Output, Callable[[], Tensor | None]] = {
            "output": lambda: channel_affine(activation, remaining, shift),
            "activation": lambda: activation,
            "scale": lambda: remaining,
            "shift": lambda: shift,
            "affine": lambda: affine,
        }
        results = tuple(compute[name]() for name in self.outputs)
        return results[0] if len(results) == 1 else results

    def extra_repr(self) -> str:
        text = f"{self.num_groups}, {self.num_channels}, eps={self.eps}, proxy_eps={self.proxy_eps}"
        return text if self.outputs == ("output",) else f"{text}, outputs={self.outputs}"


def _identical(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` [C] in the shape and dtype to meet `x`, [N, C, *] or, flattened, [N, C * S]."""
    if x.dim() == 2 and x.shape[1] != values.shape[0]:
        values = values.repeat_interleave(x.shape[1] // values.shape[0])
    return values.view(-1, *[1] * (x.dim() - 2))


def channel_affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x * scale + shift per channel, computed in the wider of the dtypes, returned in that of x."""
    if scale is None:
        if shift is None:
            return x
        return (x + per_channel(shift, x)).to(x.dtype)
    if shift is None:
        return (x * per_channel(scale, x)).to(x.dtype)
    return torch.addcmul(per_channel(shift, x), x, per_channel(scale, x)).to(x.dtype)


def gated_affine(x: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor) -> Tensor:
    """(x * scale + shift) * gate in one pass over x, for a small gate such as [N, C, 1, 1]."""
    factor = gate if scale is None else gate * per_channel(scale, x)
    if shift is None:
        return (x * factor).to(x.dtype)
    return torch.addcmul(gate * per_channel(shift, x), x, factor).to(x.dtype)


class ChannelAffine(nn.Module):
    """x * scale + shift, per channel, for a user of a site that cannot take them in itself.

    With a `gate`, the product with it as well: the gate takes in scale and shift.
    """

    def forward(
        self, x: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None = None
    ) -> Tensor:
        return channel_affine(x, scale, shift) if gate is None else gated_affine(x, scale, shift, gate)


class ConstantAffine(nn.Module):
    """`ChannelAffine` with constants, in a folded network. `scale` or `shift` may be None."""

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, scale: Tensor | None, shift: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        scale = None if self.scale is None else per_channel(self.scale, x)
        shift = None if self.shift is None else per_channel(self.shift, x)
        if gate is not None:
            scale = gate if scale is None else gate * scale
            shift = None if shift is None else gate * shift
        x = x if scale is None else x * scale
        return x if shift is None else x + shift


class ConstantClamp(nn.Module):
    """clip(x, lower, upper) with bounds per channel, [C]; either may be None.

    A folded clip: (clip(u, l, h) - mean) r = clip(u r - mean r, (l - mean) r, (h - mean) r), r > 0.
    """

    lower: Tensor | None
    upper: Tensor | None

    def __init__(self, lower: Tensor | None, upper: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("lower", lower)
        self.register_buffer("upper", upper)

    def forward(self, x: Tensor) -> Tensor:
        if self.lower is not None:
            x = torch.maximum(x, per_channel(self.lower, x))
        return x if self.upper is None else torch.minimum(x, per_channel(self.upper, x))


def absorb_affine(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear operator that takes x where (weight, bias) takes x * scale + shift.

        W'[o, i, *] = W[o, i, *] scale[i]        b'[o] = b[o] + sum over i, * of W[o, i, *] shift[i]

    The second is exact behind zero padding too if the padding stands before the affine.

    Args:
        weight: [O, I / groups, *kernel] of a convolution, or [O, I] of a linear layer.
        bias: [O] or None.
        scale, shift: [I], or None.
        groups: of the convolution.
    """
    per_group = weight.shape[1]
    if shift is not None:
        # a product of matrix and vector: one pass over the weight
        rows = weight.reshape(groups, weight.shape[0] // groups, -1).to(shift.dtype)
        pixels = rows.shape[2] // per_group
        inputs = shift.reshape(groups, per_group, 1).expand(-1, -1, pixels).reshape(groups, -1)
        extra = torch.einsum("goi,gi->go", rows, inputs).flatten()
        bias = (extra if bias is None else bias + extra).to(weight.dtype)
    if scale is not None:
        # [groups, I / groups] -> one row per output channel
        rows = scale.reshape(groups, 1, per_group).expand(-1, weight.shape[0] // groups, -1)
        rows = rows.reshape(weight.shape[0], per_group, *[1] * (weight.dim() - 2))
        weight = (weight * rows).to(weight.dtype)
    return weight, bias


class _InputAffineConv(nn.modules.conv._ConvNd):
    """A convolution of ``x * scale + shift`` whose padding is applied to x, before the affine.

    Parameters and options are those of the convolution that it replaces, under the same names.
    scale and shift are [in_channels] or None. Source: docs/method.md, "Where the padding stands".
    """

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        weight, bias = absorb_affine(self.weight, self.bias, scale, shift, self.groups)
        return self._conv_forward(x, weight, bias)


class InputAffineConv1d(_InputAffineConv, nn.Conv1d):
    """Conv1d of ``x * scale + shift``, the padding applied to x; scale and shift [in_channels] or None."""


class InputAffineConv2d(_InputAffineConv, nn.Conv2d):
    """Conv2d of ``x * scale + shift``, the padding applied to x; scale and shift [in_channels] or None."""


class InputAffineConv3d(_InputAffineConv, nn.Conv3d):
    """Conv3d of ``x * scale + shift``, the padding applied to x; scale and shift [in_channels] or None."""


class InputAffineLinear(nn.Linear):
    """A linear layer of ``x * scale + shift``, x [N, C] or flattened from [N, C, *] to [N, C * S].

    scale and shift are [C] or None; with S > 1 each stands for the S features of its channel.
    """

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if x.dim() != 2:
            raise ConfigError(
                f"this Linear was converted for inputs [N, C] and got {tuple(x.shape)}: pass "
                "example_inputs to transform"
            )
        weight, bias = absorb_affine(self.weight, self.bias, self.per_feature(scale), self.per_feature(shift))
        return F.linear(x, weight, bias)

    def per_feature(self, values: Tensor | None) -> Tensor | None:
        """[C] -> [C * S]"""
        if values is None or values.shape[0] == self.in_features:
            return values
        return values.repeat_interleave(self.in_features // values.shape[0])


class ReadTraining(nn.Module):
    """Returns its own train/eval mode, for functions that take it as an argument."""

    def forward(self) -> bool:
        return self.training


#: linear operators that can take in a scale and a shift -> the class that does
INPUT_AFFINE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: InputAffineConv1d,
    nn.Conv2d: InputAffineConv2d,
    nn.Conv3d: InputAffineConv3d,
    nn.Linear: InputAffineLinear,
}
