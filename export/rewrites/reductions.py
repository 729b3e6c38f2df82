"""Normalizers of one group as reductions over the axes of the tensor, which OpenVINO runs in one kernel each.

Its own passes make MVN of (x - mean) / sqrt(mean of squares + eps), and NormalizeL2 of
x / sqrt(sum of squares + eps), over all axes but the first. These kernels know the layout of convolutions,
and take in the weight, bias and activation that follow. A Reshape to groups hides the pattern, or has memory
reordered around the kernel.
"""

import math

import numpy as np
import onnx_ir

from pn_compiler.export.rewrites.norms import Norm, replace_norms
from pn_compiler.export.rewrites.rules import sizes


def use_reductions(model: onnx_ir.Model) -> int:
    """Rewrites each normalizer of one group.

    Args:
        model: edited in place; its shapes must be known.

    Returns:
        How many were rewritten.
    """
    return replace_norms(model, lambda norm: norm.groups == 1 and norm.share[0] > 0, _standardized)


def _standardized(tape: onnx_ir.tape.Tape, norm: Norm) -> onnx_ir.Value:
    """(x - c) / sqrt(E + var / share), times what its form leaves for the weight behind: a constant."""

    def stored(value: float, name: str) -> onnx_ir.Value:
        dtype = np.float32 if norm.x.dtype is None else norm.x.dtype.numpy()
        return tape.initializer(onnx_ir.tensor(np.array(value, dtype)), f"{norm.y.name}_{name}")

    x, shape = norm.x, sizes(norm.x)[1:]
    axes = tape.initializer(onnx_ir.tensor(np.arange(1, 1 + len(shape))), f"{norm.y.name}_axes")
    count = 1 if norm.centered else math.prod(shape)
    if norm.centered:
        x = tape.op("Sub", [x, tape.op("ReduceMean", [x, axes])])
        squares = tape.op("ReduceMean", [tape.op("Mul", [x, x]), axes])
    else:
        squares = tape.op("ReduceSum", [tape.op("Pow", [x, stored(2, "two")]), axes])
    share, var = float(norm.share[0]), float(norm.var[0])
    length = tape.op("Sqrt", [tape.op("Add", [squares, stored(count * var / share, "epsilon")])])
    y, factor = tape.op("Div", [x, length]), math.sqrt(count / share)
    return y if factor == 1 else tape.op("Mul", [y, stored(factor, "factor")])
