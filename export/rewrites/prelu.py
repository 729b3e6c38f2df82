"""PRelu in operators that onnxruntime runs fast: its own kernel takes 50 times as long as a Relu."""

from typing import Any

import numpy as np
import onnx_ir

from pn_compiler.export.rewrites.rules import apply_rule, contents, is_constant, sizes


def use_leaky_relus(model: onnx_ir.Model) -> int:
    """Replaces each PRelu with one constant slope by a LeakyRelu, in place. Returns how many."""
    return apply_rule(model, _prelu, _has_one_slope, _leaky_relu)


def expand_prelus(model: onnx_ir.Model) -> int:
    """Replaces PRelu of [N, C, H, W] with a constant slope for each channel by convolutions and a Relu.

    PRelu(x) = slope x + (1 - slope) Relu(x), both products being depthwise 1x1 convolutions, which stay in
    the blocked layout and of which the second adds the first.

    Args:
        model: edited in place; its shapes must be known.

    Returns:
        How many were replaced.
    """
    return apply_rule(model, _prelu, _has_slopes_of_channels, _line_and_bend)


def _prelu(op: Any, x: Any, slope: Any) -> Any:
    return op.PRelu(x, slope, _outputs=["y"])


def _has_one_slope(context: Any, slope: onnx_ir.Value, **_: Any) -> bool:
    return is_constant(slope) and len(np.unique(contents(slope))) == 1


def _leaky_relu(op: Any, x: onnx_ir.Value, slope: onnx_ir.Value, **_: Any) -> Any:
    return op.LeakyRelu(x, alpha=float(contents(slope).flat[0]))


def _has_slopes_of_channels(context: Any, x: onnx_ir.Value, slope: onnx_ir.Value, **_: Any) -> bool:
    shape = sizes(x)
    return is_constant(slope) and len(shape) == 4 and contents(slope).shape[-3:] == (shape[1], 1, 1)


def _line_and_bend(op: Any, x: onnx_ir.Value, slope: onnx_ir.Value, y: onnx_ir.Value) -> Any:
    values = contents(slope).reshape(-1, 1, 1, 1)

    def depthwise(x: onnx_ir.Value, weight: Any, name: str) -> Any:
        weight = op.initializer(onnx_ir.tensor(weight), f"{y.name}_{name}")
        return op.Conv(x, weight, group=len(values), kernel_shape=[1, 1])

    return op.Add(depthwise(x, values, "slope"), depthwise(op.Relu(x), 1 - values, "rest"))
