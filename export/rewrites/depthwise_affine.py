"""The affine of a normalizer as an operator that onnxruntime runs in the layout of convolutions."""

from typing import Any

import numpy as np
import onnx

from pn_compiler.export.rewrites.onnx_graph import GraphView, drop_unread, substitute


def use_depthwise_affines(model: onnx.ModelProto, folder: str = "") -> int:
    """Replaces x * weight + bias, with constants for each channel of [N, C, H, W], by a depthwise 1x1 Conv.

    onnxruntime moves such a Conv into the blocked layout of the convolutions behind it, together with the
    activation, where Mul and Add are two passes of their own in the plain one.

    Args:
        model: edited in place; its value_info tells the shapes.
        folder: where the files of external data lie.

    Returns:
        How many pairs were replaced.
    """
    graph = model.graph
    view = GraphView(graph, folder)
    replacements: dict[str, list[onnx.NodeProto]] = {}
    for scale in [node for node in graph.node if node.op_type == "Mul"]:
        shift = view.only_reader(scale.output[0])
        if shift is None or shift.op_type != "Add":
            continue
        x, weight = _split(scale, view)
        _, bias = _split(shift, view)
        shape = view.shapes.get(x, [])
        if len(shape) != 4 or weight is None or bias is None or {len(weight), len(bias)} != {shape[1]}:
            continue
        channels, y = shape[1], shift.output[0]
        names = f"{y}_weight", f"{y}_bias"
        graph.initializer.extend([
            onnx.numpy_helper.from_array(weight.reshape(channels, 1, 1, 1), names[0]),
            onnx.numpy_helper.from_array(bias, names[1]),
        ])  # fmt: skip
        conv = onnx.helper.make_node(
            "Conv", [x, *names], [y], name=shift.name, group=channels, kernel_shape=[1, 1]
        )
        replacements |= {scale.output[0]: [], y: [conv]}
    substitute(graph, replacements)
    drop_unread(graph)
    return len(replacements) // 2


def _split(node: onnx.NodeProto, view: GraphView) -> tuple[str, np.ndarray[Any, Any] | None]:
    """(what a Mul or Add is computed from, the values of its constant [C, 1, 1] or None if it has none)."""
    x, constant = node.input if node.input[1] in view.constants else reversed(node.input)
    tensor = view.constants.get(constant)
    if tensor is None or len(tensor.dims) not in (3, 4) or tuple(tensor.dims[-2:]) != (1, 1):
        return x, None
    values = view.values(constant)
    assert values is not None
    return x, values.reshape(-1) if values.size == values.shape[-3] else None
