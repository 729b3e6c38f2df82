"""Small rewrites of an ONNX model that the exporter leaves undone."""

import numpy as np
import onnx

from pn_compiler.export.rewrites.onnx_graph import GraphView, substitute


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
    view = GraphView(graph)
    frozen: dict[str, list[onnx.NodeProto]] = {}
    for node in [n for n in graph.node if _is_whole_shape(n)]:
        source, result = node.input[0], node.output[0]
        dims, readers = view.shapes.get(source), view.readers.get(result, [])
        only_reshapes = all(n.op_type == "Reshape" and n.input[0] != result for n in readers)
        if dims is None or dims.count(-1) > 1 or 0 in dims or not only_reshapes or result in view.outputs:
            continue
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(dims, np.int64), result))
        for reshape in readers:
            if reshape.output[0] in view.types:  # so far of unknown sizes
                view.types[reshape.output[0]].CopyFrom(view.types[source])
        frozen[result] = []
    substitute(graph, frozen)
    return len(frozen)


def _is_whole_shape(node: onnx.NodeProto) -> bool:
    return node.op_type == "Shape" and all((a.name, a.i) == ("start", 0) for a in node.attribute)
