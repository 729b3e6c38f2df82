"""The affine of a normalizer as an operator that onnxruntime runs in the layout of convolutions."""

from typing import Any

import onnx_ir

from pn_compiler.export.rewrites.rules import apply_rule, contents, is_constant, sizes


def use_depthwise_affines(model: onnx_ir.Model) -> int:
    """Replaces x * weight + bias, with constants for each channel of [N, C, H, W], by a depthwise 1x1 Conv.

    onnxruntime moves such a Conv into the blocked layout of the convolutions behind it, together with the
    activation, where Mul and Add are two passes of their own in the plain one.

    Args:
        model: edited in place; its shapes must be known.

    Returns:
        How many pairs were replaced.
    """
    return apply_rule(model, _affine, _is_per_channel, _depthwise, commute=True)


def _affine(op: Any, x: Any, weight: Any, bias: Any) -> Any:
    return op.Add(op.Mul(x, weight), bias, _outputs=["y"])


def _is_per_channel(
    context: Any, x: onnx_ir.Value, weight: onnx_ir.Value, bias: onnx_ir.Value, **_: Any
) -> bool:
    shape = sizes(x)
    if len(shape) != 4 or shape[2:] == [1, 1] or not is_constant(weight) or not is_constant(bias):
        return False  # one number for a channel is in no layout, and may be a statistic
    channels = (shape[1], 1, 1)
    return all(contents(value).shape in (channels, (1, *channels)) for value in (weight, bias))


def _depthwise(
    op: Any, x: onnx_ir.Value, weight: onnx_ir.Value, bias: onnx_ir.Value, y: onnx_ir.Value
) -> Any:
    scale, shift = contents(weight).reshape(-1, 1, 1, 1), contents(bias).reshape(-1)
    kernel = op.initializer(onnx_ir.tensor(scale), f"{y.name}_weight")
    offset = op.initializer(onnx_ir.tensor(shift), f"{y.name}_bias")
    return op.Conv(x, kernel, offset, group=len(scale), kernel_shape=[1, 1])
