"""x * scale + shift per channel: applied to x, or absorbed by the weight and bias of a layer that reads x.

It is a product and an in-place sum, not addcmul, which takes four times as long if two factors broadcast.
"""

import math

import torch
from torch import Tensor


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` [C] in the shape and dtype to broadcast against `x`: [N, C, *] or, flattened, [N, C * S]."""
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
    return (x * per_channel(scale, x)).add_(per_channel(shift, x)).to(x.dtype)


def gated_affine(x: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor) -> Tensor:
    """(x * scale + shift) * gate, for a small gate such as [N, C, 1, 1]."""
    factor = gate if scale is None else gate * per_channel(scale, x)
    if shift is None:
        return (x * factor).to(x.dtype)
    return (x * factor).add_(gate * per_channel(shift, x)).to(x.dtype)


def absorb_affine(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Absorbs an affine into the linear operator behind it: from input x * scale + shift to input x.

        W'[o, i, *] = W[o, i, *] scale[i]        b'[o] = b[o] + sum over i, * of W[o, i, *] shift[i]

    The bias is also exact behind zero padding if the padding comes before the affine.

    Args:
        weight: [O, I / groups, *kernel] of a convolution, or [O, I] of a linear layer.
        bias: [O] or None.
        scale, shift: [I], or None.
        groups: groups of the convolution.
    """
    if is_autocast(weight.device.type):  # rounds the bias
        with torch.autocast(weight.device.type, enabled=False):
            return absorb_affine(weight, bias, scale, shift, groups)
    if shift is not None:
        extra = _times(weight.to(shift.dtype), shift, groups)
        bias = (extra if bias is None else bias + extra).to(weight.dtype)
    if scale is not None:
        rows = scale.view(groups, 1, -1).expand(-1, len(weight) // groups, -1)  # of each output channel
        weight = (weight * rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))).to(weight.dtype)
    return weight, bias


def is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def absorb_output_affine(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Absorbs an affine into the linear operator before it: from output y to output y * scale + shift.

        W'[o, *] = W[o, *] scale[o]        b'[o] = b[o] scale[o] + shift[o]

    Unlike `torch.nn.utils.fusion`, it supports transposed convolutions with groups.

    Args:
        weight: [O, I / groups, *kernel] of a convolution, [O, I] of a linear layer, or
            [I, O / groups, *kernel] of a transposed convolution.
        bias: [O] or None.
        scale, shift: [O].
        groups, transposed: attributes of the convolution.
    """
    bias = shift if bias is None else bias * scale + shift
    rows = scale.view(-1, 1)
    if transposed:
        rows = scale.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).reshape(weight.shape[:2])
    return weight * rows.view(*rows.shape, *[1] * (weight.dim() - 2)), bias


def _times(weight: Tensor, inputs: Tensor, groups: int) -> Tensor:
    """Sums of weight[o, i, *] * inputs[i], [O], in few operators, since it runs in every training step."""
    if weight.shape[1] == 1:  # depthwise
        outputs = inputs if len(weight) == groups else inputs.repeat_interleave(len(weight) // groups)
        return weight.flatten(1).sum(1) * outputs
    if groups > 1:
        shape = (groups, len(weight) // groups, weight.shape[1])
        return (weight.reshape(*shape, -1) * inputs.view(groups, 1, -1, 1)).sum((2, 3)).view(-1)
    if weight.dim() > 2:
        pixels = math.prod(weight.shape[2:])
        inputs = inputs if pixels == 1 else inputs[:, None].expand(-1, pixels).reshape(-1)
        weight = weight.flatten(1)
    return torch.mv(weight, inputs)
