"""The affine of a normalizer as an operator that onnxruntime runs in the layout of convolutions."""

import numpy as np
import onnx


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
    constants = {tensor.name: tensor for tensor in graph.initializer}
    channels_of = {
        value.name: value.type.tensor_type.shape.dim[1].dim_value
        for value in (*graph.value_info, *graph.input)
        if len(value.type.tensor_type.shape.dim) == 4
    }
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    replaced = 0
    for scale in [node for node in graph.node if node.op_type == "Mul"]:
        product, following = scale.output[0], readers.get(scale.output[0], [])
        if product in outputs or len(following) != 1 or following[0].op_type != "Add":
            continue
        (shift,) = following
        x, weight = _split(scale, constants, folder)
        _, bias = _split(shift, constants, folder)
        channels = channels_of.get(x)
        if channels is None or weight is None or bias is None or {len(weight), len(bias)} != {channels}:
            continue
        names = f"{shift.output[0]}_weight", f"{shift.output[0]}_bias"
        graph.initializer.extend([
            onnx.numpy_helper.from_array(weight.reshape(channels, 1, 1, 1), names[0]),
            onnx.numpy_helper.from_array(bias, names[1]),
        ])  # fmt: skip
        shift.CopyFrom(
            onnx.helper.make_node(
                "Conv", [x, *names], list(shift.output), name=shift.name, group=channels, kernel_shape=[1, 1]
            )
        )
        graph.node.remove(scale)
        replaced += 1
    _drop_unread(graph)
    return replaced


def _split(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], folder: str
) -> tuple[str, np.ndarray | None]:
    """(what a Mul or Add is computed from, the values of its constant [C, 1, 1] or None if it has none)."""
    x, constant = node.input if node.input[1] in constants else reversed(node.input)
    tensor = constants.get(constant)
    if tensor is None or len(tensor.dims) not in (3, 4) or tuple(tensor.dims[-2:]) != (1, 1):
        return x, None
    values = onnx.numpy_helper.to_array(tensor, folder)
    return x, values.reshape(-1) if values.size == values.shape[-3] else None


def _drop_unread(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)
