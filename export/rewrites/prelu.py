"""PRelu in operators that onnxruntime runs fast: its own kernel takes 50 times as long as a Relu."""

import functools

import numpy as np
import onnx
from onnx.helper import make_node

from pn_compiler.export.rewrites.onnx_graph import GraphView, drop_unread, substitute


def use_leaky_relus(model: onnx.ModelProto, folder: str = "") -> int:
    """Replaces each PRelu with one constant slope by a LeakyRelu.

    Args:
        model: edited in place.
        folder: where the files of external data lie.

    Returns:
        How many were replaced.
    """
    graph = model.graph
    view = GraphView(graph, folder)
    replacements = {}
    for node in [node for node in graph.node if node.op_type == "PRelu"]:
        slope = view.values(node.input[1])
        if slope is not None and slope.size and (slope == slope.flat[0]).all():
            replacements[node.output[0]] = [
                make_node(
                    "LeakyRelu", node.input[:1], node.output, name=node.name, alpha=float(slope.flat[0])
                )
            ]
    substitute(graph, replacements)
    drop_unread(graph)
    return len(replacements)


def expand_prelus(model: onnx.ModelProto, folder: str = "") -> int:
    """Replaces PRelu of [N, C, H, W] with a constant slope for each channel by convolutions and a Relu.

    PRelu(x) = slope x + (1 - slope) Relu(x), both products being depthwise 1x1 convolutions, which stay in
    the blocked layout and of which the second adds the first.

    Args:
        model: edited in place; its value_info tells the shapes.
        folder: where the files of external data lie.

    Returns:
        How many were replaced.
    """
    graph = model.graph
    view = GraphView(graph, folder)
    replacements = {}
    for node in [node for node in graph.node if node.op_type == "PRelu"]:
        (x, name), y = node.input, node.output[0]
        slope, shape = view.values(name), view.shapes.get(x, [])
        if slope is None or len(shape) != 4 or slope.shape[-3:] != (shape[1], 1, 1):
            continue
        weights = {f"{y}_slope": slope, f"{y}_rest": 1 - slope}
        graph.initializer.extend(
            onnx.numpy_helper.from_array(np.asarray(w).reshape(-1, 1, 1, 1), k) for k, w in weights.items()
        )
        depthwise = functools.partial(make_node, "Conv", group=shape[1], kernel_shape=[1, 1])
        replacements[y] = [
            depthwise([x, f"{y}_slope"], [f"{y}_line"]),
            make_node("Relu", [x], [f"{y}_positive"]),
            depthwise([f"{y}_positive", f"{y}_rest"], [f"{y}_bend"]),
            make_node("Add", [f"{y}_line", f"{y}_bend"], [y], name=node.name),
        ]
    substitute(graph, replacements)
    drop_unread(graph)
    return len(replacements)
