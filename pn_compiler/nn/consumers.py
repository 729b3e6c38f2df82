"""Layers that absorb or apply a site's scale and shift.

All are leaves for torch.fx. The ``InputAffine*`` modules have the same parameters as those they replace.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.numerics.affine import absorb_affine, channel_affine, gated_affine, is_autocast, per_channel
from pn_compiler.numerics.eager import runs_eagerly
from pn_compiler.numerics.memo import Memo


def _channel_or_gated_affine(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None
) -> Tensor:
    return channel_affine(x, scale, shift) if gate is None else gated_affine(x, scale, shift, gate)


class ChannelAffine(nn.Module):
    """x * scale + shift, per channel, for a consumer of a site that cannot absorb them.

    With a `gate`, it also multiplies by the gate, which absorbs scale and shift.
    """

    def forward(
        self, x: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None = None
    ) -> Tensor:
        return _channel_or_gated_affine(x, scale, shift, gate)


class ConstantAffine(nn.Module):
    """`ChannelAffine` with constants, in a folded network. `scale` or `shift` may be None.

    With both and no gate, it is exported as one BatchNormalization, which takes half the time of Mul and Add
    in onnxruntime and stays in the blocked layout of the convolutions around it (docs/static.md).
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, scale: Tensor | None, shift: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        scale, shift = self.scale, self.shift
        if gate is not None or scale is None or shift is None:
            return _channel_or_gated_affine(x, scale, shift, gate)
        if x.shape[1] != len(scale) or x.dtype != scale.dtype:  # flattened, or mixed precision
            return channel_affine(x, scale, shift)
        mean, var = torch.zeros_like(scale), torch.ones_like(scale)  # with eps 0 exactly x * scale + shift
        return F.batch_norm(x, mean, var, scale, shift, training=False, eps=0.0)

    def write_out(self) -> tuple[Tensor, Tensor]:
        """Returns scale and shift, [C] float64; one that was None becomes 1 or 0."""
        like = self.scale if self.scale is not None else self.shift
        assert like is not None
        self.scale = torch.ones_like(like) if self.scale is None else self.scale
        self.shift = torch.zeros_like(like) if self.shift is None else self.shift
        return self.scale.double(), self.shift.double()


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


MEMO = "_memo"  # attribute of a consumer that has been evaluated
_SMALL = 2**16  # most elements of a weight whose scaled copy is kept


def _absorbed(
    module: Any, scale: Tensor | None, shift: Tensor | None, groups: int = 1
) -> tuple[Tensor, Tensor | None]:
    """`absorb_affine` of weight and bias; memoized in eval mode while nothing changes."""
    weight, bias = module.weight, module.bias

    def compute() -> tuple[Tensor, Tensor | None]:
        return absorb_affine(weight, bias, scale, shift, groups)

    if weight.numel() > _SMALL or torch.is_grad_enabled():
        return compute()
    memo: Memo = module.__dict__.setdefault(MEMO, Memo())
    return memo.recall((weight, bias, scale, shift), compute)


def _is_smaller(x: Tensor, weight: Tensor) -> bool:
    """Whether to apply an affine to `x` because it is smaller than the weight that would absorb it.

    So it is in the last layers and for few samples. Larger kernels gain nothing, and half precision would
    round x once more.
    """
    return (
        runs_eagerly(x, weight)
        and x.numel() < weight.numel() == weight.shape[0] * weight.shape[1]
        and x.dim() == weight.dim()  # with samples
        and x.dtype == weight.dtype == torch.promote_types(x.dtype, torch.float32)
        and not is_autocast(x.device.type)
    )


class _InputAffineConv(nn.modules.conv._ConvNd):
    """A convolution of ``x * scale + shift`` whose padding is applied to x, before the affine.

    It has the parameters and options of the convolution that it replaces, under the same names.
    scale and shift are [in_channels] or None. Source: docs/method.md, "Where the padding stands".
    """

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        padded = self.padding_mode == "zeros" and any(self._reversed_padding_repeated_twice)
        if self.training and not padded and _is_smaller(x, self.weight):  # else the weight is memoized
            return self._conv_forward(channel_affine(x, scale, shift), self.weight, self.bias)
        return self._conv_forward(x, *_absorbed(self, scale, shift, self.groups))


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
        if self.training and _is_smaller(x, self.weight):  # else the weight is memoized
            return F.linear(channel_affine(x, scale, shift), self.weight, self.bias)
        return F.linear(x, *_absorbed(self, self.per_feature(scale), self.per_feature(shift)))

    def per_feature(self, values: Tensor | None) -> Tensor | None:
        """[C] -> [C * S]"""
        if values is None or values.shape[0] == self.in_features:
            return values
        return values.repeat_interleave(self.in_features // values.shape[0])


class ReadTraining(nn.Module):
    """Returns its own train/eval mode, for functions that take it as an argument."""

    def forward(self) -> bool:
        return self.training


#: linear operators that can absorb a scale and a shift -> the class that does
INPUT_AFFINE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: InputAffineConv1d,
    nn.Conv2d: InputAffineConv2d,
    nn.Conv3d: InputAffineConv3d,
    nn.Linear: InputAffineLinear,
}
