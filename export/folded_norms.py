"""Normalizers of a folded network as one operator each, while torch.onnx works on it.

Composed of operators, as `FoldedNorm` is, each is some fourteen for torch.export, torch.onnx and its
optimizer, which take time for each of them. What is written is the same.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir
import torch
import torch.onnx.ops
from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass
from torch import Tensor, nn

from pn_compiler.export.rewrites.rules import contents, is_constant
from pn_compiler.nn import FoldedNorm

_DOMAIN = "pn_compiler"
_NAME = "FoldedNorm"


@contextlib.contextmanager
def as_one_operator(model: nn.Module) -> Iterator[None]:
    """Lets torch.export see each FoldedNorm in `model` as one operator; see `expand_folded_norms`."""
    with contextlib.ExitStack() as stack:
        for norm in model.modules():
            if isinstance(norm, FoldedNorm) and "normalize" not in vars(norm):
                vars(norm)["normalize"] = functools.partial(_normalize, norm, norm.normalize)
                stack.callback(vars(norm).pop, "normalize")
        yield


def _normalize(
    norm: FoldedNorm, plain: Any, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`FoldedNorm.normalize`, which `plain` is; the operator has no values outside a trace."""
    inputs = [x, norm.var, norm.share, norm.shift, weight, bias]
    alike = all(value is None or value.dtype == x.dtype for value in inputs)
    if not (alike and torch.compiler.is_exporting() and x.dim() > 1 and x.shape[1] == norm.num_channels):
        return plain(x, weight, bias)  # type: ignore[no-any-return]
    attributes: dict[str, Any] = {"centered": int(norm.centered)}
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{_NAME}", inputs, attributes, dtype=x.dtype, shape=x.shape, version=1
    )


def expand_folded_norms(model: onnx_ir.Model) -> int:
    """Replaces each operator of `as_one_operator` by those that `FoldedNorm.normalize` is composed of.

    Args:
        model: edited in place; its shapes must be known.

    Returns:
        How many were replaced.
    """
    nodes = [node for node in model.graph if (node.domain, node.op_type) == (_DOMAIN, _NAME)]
    for node in nodes:
        _Expansion(model.graph, node).run()
    if nodes:
        model.opset_imports.pop(_DOMAIN, None)
        RemoveUnusedNodesPass()(model)
        DeduplicateInitializersPass()(model)
    return len(nodes)


class _Expansion:
    """The operators of one normalizer, in the place of `node`."""

    def __init__(self, graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
        self.graph, self.node, self.y = graph, node, node.outputs[0]
        self.nodes: list[onnx_ir.Node] = []

    def run(self) -> None:
        x, var, share, shift, weight, bias = (*self.node.inputs, *[None] * 4)[:6]
        assert x is not None
        assert x.shape is not None
        assert var is not None
        assert var.shape is not None
        groups, ones = var.shape[0], [1] * (len(x.shape) - 2)
        assert isinstance(groups, int)
        per_group, per_channel = [groups, 1, 1], [-1, *ones]
        value = x if shift is None else self.op("Sub", x, self.spread(shift, per_channel), shape=x.shape)
        value = self.grouped(value, groups)
        if self.node.attributes["centered"].as_int():
            value = self.op("Sub", value, self.mean(value), shape=value.shape)
        power = self.mean(self.op("Mul", value, value, shape=value.shape))
        if share is not None:
            power = self.op("Mul", power, self.spread(share, per_group), shape=power.shape)
        power = self.op("Add", power, self.spread(var, per_group), shape=power.shape)
        inverse = self.op("Reciprocal", self.op("Sqrt", power, shape=power.shape), shape=power.shape)
        value = self.op("Mul", value, inverse, shape=value.shape)
        value = self.op("Reshape", value, self.whole_shape(x), shape=x.shape, allowzero=1)
        if weight is not None:
            value = self.op("Mul", value, self.spread(weight, per_channel), shape=x.shape)
        if bias is not None:
            value = self.op("Add", value, self.spread(bias, per_channel), shape=x.shape)
        self.put_in_place(value)

    def grouped(self, x: onnx_ir.Value, groups: int) -> onnx_ir.Value:
        """`x` [N, C, *] as [N, G, C / G, S]."""
        assert x.shape is not None
        batch, channels, *rest = x.shape
        assert isinstance(channels, int)
        known = all(isinstance(size, int) for size in rest)
        pixels = math.prod(size for size in rest if isinstance(size, int)) if known else None
        shape = onnx_ir.Shape([batch, groups, channels // groups, pixels])
        if known:
            sizes, allowzero = [batch if isinstance(batch, int) else -1, *shape[1:]], 1
        else:
            sizes, allowzero = [0, groups, channels // groups, -1], 0
        return self.op(
            "Reshape", x, self.stored(np.array(sizes), "grouped"), shape=shape, allowzero=allowzero
        )

    def whole_shape(self, x: onnx_ir.Value) -> onnx_ir.Value:
        """The shape of `x`, with -1 for one unknown size."""
        assert x.shape is not None
        sizes = [size if isinstance(size, int) else -1 for size in x.shape]
        if sizes.count(-1) > 1:
            return self.op("Shape", x, shape=onnx_ir.Shape([len(sizes)]), dtype=onnx_ir.DataType.INT64)
        return self.stored(np.array(sizes), "shape")

    def mean(self, grouped: onnx_ir.Value) -> onnx_ir.Value:
        """Means over each channel, then over its group."""
        for axis in (3, 2):
            assert grouped.shape is not None
            shape = onnx_ir.Shape([*grouped.shape[:axis], *[1] * (4 - axis)])
            axes = self.stored(np.array([axis]), f"axis_{axis}")
            grouped = self.op("ReduceMean", grouped, axes, shape=shape, keepdims=1, noop_with_empty_axes=0)
        return grouped

    def spread(self, values: onnx_ir.Value, shape: list[int]) -> onnx_ir.Value:
        """`values` [C] or [G] in a shape to broadcast; a model may compute them."""
        if is_constant(values):
            return self.stored(contents(values).reshape(shape), str(values.name))
        length = values.shape and values.shape[0]
        spread = onnx_ir.Shape([length or size if size == -1 else size for size in shape])
        return self.op("Reshape", values, self.stored(np.array(shape), "spread"), shape=spread)

    def stored(self, values: np.ndarray[Any, Any], name: str) -> onnx_ir.Value:
        constant = onnx_ir.Value(name=f"{self.y.name}/{name}", const_value=onnx_ir.tensor(values))
        constant.shape, constant.dtype = (
            onnx_ir.Shape(values.shape),
            onnx_ir.DataType.from_numpy(values.dtype),
        )
        return self.graph.initializers.setdefault(str(constant.name), constant)

    def op(
        self,
        name: str,
        *inputs: onnx_ir.Value,
        shape: onnx_ir.Shape | None,
        dtype: onnx_ir.DataType | None = None,
        **attributes: int,
    ) -> onnx_ir.Value:
        result = onnx_ir.Value(
            name=f"{self.y.name}/{len(self.nodes)}",
            shape=None if shape is None else shape.copy(),
            type=inputs[0].type if dtype is None else onnx_ir.TensorType(dtype),
        )
        node = onnx_ir.node(name, inputs, attributes, outputs=[result])
        self.nodes.append(node)
        return result

    def put_in_place(self, result: onnx_ir.Value) -> None:
        """Lets `result` be what the node gave, under its name."""
        self.graph.insert_before(self.node, self.nodes)
        result.name, self.y.name = self.y.name, None
        onnx_ir.convenience.replace_all_uses_with(self.y, result, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
