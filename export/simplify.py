"""Small rewrites of an ONNX model that the exporter leaves undone."""

import numpy as np
import onnx


def freeze_reshapes(model: onnx.ModelProto) -> int:
    """Replaces Reshape(x, Shape(y)) by a Reshape to a constant, where y has one unknown axis at most.

    The exporter restores the shape behind a normalizer with such a pair; with only the batch unknown the
    constant is [-1, C, H, W].

    Args:
        model: edited in place; its value_info tells the shapes.

    Returns:
        How many Shape nodes went.
    """
    graph = model.graph
    values = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, index))
    outputs = {value.name for value in graph.output}
    frozen = 0
    for node in [n for n in graph.node if _is_whole_shape(n)]:
        source, result = node.input[0], node.output[0]
        dims = _dims(values[source]) if source in values else None
        only_reshapes = all(n.op_type == "Reshape" and i == 1 for n, i in readers.get(result, []))
        if dims is None or dims.count(-1) > 1 or 0 in dims or not only_reshapes or result in outputs:
            continue
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(dims, np.int64), result))
        graph.node.remove(node)
        for reshape, _ in readers.get(result, []):
            if reshape.output[0] in values:  # so far of unknown sizes
                shape = values[reshape.output[0]].type.tensor_type.shape
                shape.CopyFrom(values[source].type.tensor_type.shape)
        frozen += 1
    return frozen


def _is_whole_shape(node: onnx.NodeProto) -> bool:
    return node.op_type == "Shape" and all((a.name, a.i) == ("start", 0) for a in node.attribute)


def _dims(value: onnx.ValueInfoProto) -> list[int] | None:
    """Sizes of a tensor, -1 where unknown; None if not even the rank is known."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
