"""Which operators compute a normalizer, statistics first.

torch.onnx gives Reshape to [N, G, L], InstanceNormalization, Reshape, Mul and Add below opset 21, and
GroupNormalization from there on.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir

from pn_compiler.export.rewrites.norms import Norm, replace_norms
from pn_compiler.export.rewrites.rules import apply_rule, contents, is_constant, sizes

_BLOCK = 16  # channels that onnxruntime lays out together with AVX-512; with AVX2 it is half of them


def expand_group_norms(model: onnx_ir.Model) -> int:
    """Replaces each GroupNormalization by what torch.onnx gives below opset 21.

    onnxruntime has no CPU kernel for it, and expands it into some twenty small operators.

    Args:
        model: edited in place; its shapes must be known.

    Returns:
        How many were replaced: all whose rank is known.
    """
    return apply_rule(model, _group_norm, _has_rank, _instance_norm_and_affine)


def use_two_stage_sums(model: onnx_ir.Model) -> int:
    """Replaces each InstanceNormalization of [N, G, L] by means over each channel, then over its group.

    onnxruntime's InstanceNormalization adds a group up in one run of float32: off by 1e-5 for 10^6 values,
    which deep residual networks amplify. These sums are off by 2e-7. They take about twice the time on one
    thread, and share it among several, which InstanceNormalization never does.

    Args:
        model: edited in place; its shapes must be known.

    Returns:
        How many were replaced: those with weight 1 and bias 0 between a Reshape of [N, C, ...] and another.
    """
    return apply_rule(model, _reshaped_instance_norm, _is_plain_group_norm, _two_stage_norm)


def pool_squares(model: onnx_ir.Model) -> int:
    """Takes the mean square of images by GlobalAveragePool, for normalizers of one group without a mean.

    onnxruntime computes Mul(x, x) and GlobalAveragePool in the layout of the convolution before them, from
    where only one number per channel is brought to the plain one. With the two Reshapes gone as well,
    mobilenet_v2 takes 1.65 times the time of BatchNorm, not 1.71 (1 thread, 224x224).

    Args:
        model: edited in place; its shapes must be known.

    Returns:
        How many were rewritten.
    """
    return replace_norms(model, _is_of_image_without_mean, _pooled)


def _pooled(tape: onnx_ir.tape.Tape, norm: Norm) -> onnx_ir.Value:
    dtype = norm.x.dtype.numpy() if norm.x.dtype is not None else np.float32
    graph = tape.graph_like
    assert isinstance(graph, onnx_ir.Graph)

    def stored(values: Any, name: str) -> onnx_ir.Value:
        return tape.initializer(onnx_ir.tensor(values), f"{norm.y.name}_{name}")

    def op(name: str, *inputs: onnx_ir.Value) -> onnx_ir.Value:
        return tape.op(name, inputs, output=onnx_ir.Value(name=f"{norm.y.name}/{len(graph)}"))

    pooled = op("GlobalAveragePool", op("Mul", norm.x, norm.x))
    power = op("ReduceMean", pooled, stored(np.array([1]), "axis"))
    if norm.share[0] != 1:
        power = op("Mul", power, stored(norm.share.astype(dtype), "share"))
    variance = op("Add", power, stored(norm.var.astype(dtype), "var"))
    return op("Mul", norm.x, op("Pow", variance, stored(np.array([-0.5], dtype), "exponent")))


def _is_of_image_without_mean(norm: Norm) -> bool:
    fills_blocks = norm.channels % _BLOCK == 0  # else onnxruntime pools in the plain layout
    return len(sizes(norm.x)) == 4 and norm.groups == 1 and not norm.centered and fills_blocks


def _group_norm(op: Any, x: Any, weight: Any, bias: Any) -> Any:
    return op.GroupNormalization(x, weight, bias, _outputs=["y"])


def _has_rank(context: Any, x: onnx_ir.Value, **_: Any) -> bool:
    return bool(sizes(x)) and x.dtype is not None


def _instance_norm_and_affine(
    op: Any, x: onnx_ir.Value, weight: onnx_ir.Value, bias: onnx_ir.Value, y: onnx_ir.Value
) -> Any:
    assert x.dtype is not None
    dtype, shape, given = x.dtype.numpy(), sizes(x), _attributes(y)
    groups = given["num_groups"].as_int()
    per_channel = np.array([-1, *[1] * (len(shape) - 2)])
    stored = _initializers(op, y)

    def spread(value: onnx_ir.Value, name: str) -> Any:
        if is_constant(value):
            return stored(contents(value).reshape(per_channel), name)
        return op.Reshape(value, stored(per_channel, f"{name}_shape"))

    normalized = op.InstanceNormalization(
        op.Reshape(x, stored(np.array([0, groups, -1]), "flat")),
        stored(np.ones(groups, dtype), "ones"),
        stored(np.zeros(groups, dtype), "zeros"),
        epsilon=given["epsilon"],
    )
    one_unknown = shape.count(-1) <= 1
    restored = op.Reshape(normalized, stored(np.array(shape), "shape") if one_unknown else op.Shape(x))
    restored.type, restored.shape = x.type, x.shape
    return op.Add(op.Mul(restored, spread(weight, "scale")), spread(bias, "shift"))


def _reshaped_instance_norm(op: Any, x: Any, flat: Any, weight: Any, bias: Any, shape: Any) -> Any:
    grouped = op.Reshape(x, flat)
    return op.Reshape(op.InstanceNormalization(grouped, weight, bias, _outputs=["y"]), shape)


def _is_plain_group_norm(
    context: Any, x: onnx_ir.Value, flat: onnx_ir.Value, weight: onnx_ir.Value, bias: onnx_ir.Value, **_: Any
) -> bool:
    channels = [*sizes(x), -1, -1][1]
    if channels < 1 or not all(is_constant(value) for value in (flat, weight, bias)):
        return False
    ones = contents(weight)
    by_groups = contents(flat).tolist() == [0, len(ones), -1]
    return by_groups and bool((ones == 1).all() and not contents(bias).any())


def _two_stage_norm(
    op: Any,
    x: onnx_ir.Value,
    weight: onnx_ir.Value,
    shape: onnx_ir.Value,
    y: onnx_ir.Value,
    **_: Any,
) -> Any:
    ones = contents(weight)
    epsilon = np.array([_attributes(y)["epsilon"].as_float()], ones.dtype)

    stored = _initializers(op, y)
    axes = [stored(np.array([axis]), f"axis_{axis}") for axis in (3, 2)]

    def mean(value: onnx_ir.Value) -> Any:
        return op.ReduceMean(op.ReduceMean(value, axes[0]), axes[1])

    sizes_in_groups = np.array([0, len(ones), sizes(x)[1] // len(ones), -1])
    grouped = op.Reshape(x, stored(sizes_in_groups, "shape"))
    centered = op.Sub(grouped, mean(grouped))
    variance = mean(op.Mul(centered, centered))
    deviation = op.Sqrt(op.Add(variance, stored(epsilon, "epsilon")))
    return op.Reshape(op.Div(centered, deviation), shape)


def _initializers(op: Any, y: onnx_ir.Value) -> Callable[[Any, str], Any]:
    """Stores constants under names that begin with that of `y`."""
    return lambda values, name: op.initializer(onnx_ir.tensor(values), f"{y.name}_{name}")


def _attributes(value: onnx_ir.Value) -> Any:
    """Those of the node that makes `value`."""
    node = value.producer()
    assert node is not None
    return node.attributes
