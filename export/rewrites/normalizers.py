"""Which operators compute a normalizer, statistics first.

torch.onnx gives Reshape to [N, G, L], InstanceNormalization, Reshape, Mul and Add below opset 21, and
GroupNormalization from there on.
"""

import numpy as np
import onnx
from onnx.helper import make_node

from pn_compiler.export.rewrites.onnx_graph import GraphView, attribute, drop_unread, substitute


def expand_group_norms(model: onnx.ModelProto, folder: str = "") -> int:
    """Replaces each GroupNormalization by what torch.onnx gives below opset 21.

    onnxruntime has no CPU kernel for it, and expands it into some twenty small operators.

    Args:
        model: edited in place; its value_info tells the shapes.
        folder: where the files of external data lie.

    Returns:
        How many were replaced: those with constant weight and bias and one unknown size at most.
    """
    graph = model.graph
    view = GraphView(graph, folder)
    replacements: dict[str, list[onnx.NodeProto]] = {}
    for norm in [node for node in graph.node if node.op_type == "GroupNormalization"]:
        (x, *parameters), y = norm.input, norm.output[0]
        weight, bias = (view.values(name) for name in parameters)
        shape = view.shapes.get(x, [])
        if weight is None or bias is None or not shape or shape.count(-1) > 1:
            continue
        groups = attribute(norm, "num_groups")
        per_channel = (shape[1], *[1] * (len(shape) - 2))
        constants = {
            "flat": np.array([0, groups, -1]),
            "ones": np.ones(groups, weight.dtype),
            "zeros": np.zeros(groups, weight.dtype),
            "shape": np.array(shape),
            "scale": weight.reshape(per_channel),
            "shift": bias.reshape(per_channel),
        }
        names = {part: f"{y}_{part}" for part in (*constants, "grouped", "normalized", "restored", "scaled")}
        graph.initializer.extend(onnx.numpy_helper.from_array(v, names[k]) for k, v in constants.items())
        steps = [
            ("Reshape", (x, names["flat"]), "grouped", {}),
            (
                "InstanceNormalization",
                (names["grouped"], names["ones"], names["zeros"]),
                "normalized",
                {"epsilon": attribute(norm, "epsilon")},
            ),
            ("Reshape", (names["normalized"], names["shape"]), "restored", {}),
            ("Mul", (names["restored"], names["scale"]), "scaled", {}),
        ]
        nodes = [make_node(kind, reads, [names[makes]], **extra) for kind, reads, makes, extra in steps]
        nodes.append(make_node("Add", [names["scaled"], names["shift"]], [y], name=norm.name))
        replacements[y] = nodes
        graph.value_info.add(name=names["restored"]).type.CopyFrom(view.types[x])
    substitute(graph, replacements)
    drop_unread(graph)
    return len(replacements)


def use_two_stage_sums(model: onnx.ModelProto, folder: str = "") -> int:
    """Replaces each InstanceNormalization of [N, G, L] by means over each channel, then over its group.

    onnxruntime's InstanceNormalization adds a group up in one run of float32: off by 1e-5 for 10^6 values,
    which deep residual networks amplify. These sums are off by 2e-7. They take about twice the time on one
    thread, and share it among several, which InstanceNormalization never does.

    Args:
        model: edited in place; its value_info tells the shapes.
        folder: where the files of external data lie.

    Returns:
        How many were replaced: those with weight 1 and bias 0 whose input is reshaped from [N, C, ...].
    """
    graph = model.graph
    view = GraphView(graph, folder)
    axes = {axis: f"two_stage_axis_{axis}" for axis in (2, 3)}
    replacements: dict[str, list[onnx.NodeProto]] = {}
    for norm in [node for node in graph.node if node.op_type == "InstanceNormalization"]:
        (x, *parameters), y = norm.input, norm.output[0]
        flat = view.producers.get(x)
        if flat is None or flat.op_type != "Reshape" or x in view.outputs or len(view.readers[x]) > 1:
            continue
        weight, bias = (view.values(name) for name in parameters)
        shape = view.shapes.get(flat.input[0], [])
        if weight is None or bias is None or (weight != 1).any() or bias.any() or len(shape) < 2:
            continue
        groups = len(weight)
        grouped, epsilon = np.array([0, groups, shape[1] // groups, -1]), attribute(norm, "epsilon")
        graph.initializer.extend([
            onnx.numpy_helper.from_array(grouped, f"{y}_shape"),
            onnx.numpy_helper.from_array(np.array([epsilon], weight.dtype), f"{y}_epsilon"),
        ])  # fmt: skip
        steps = [
            ("Reshape", (flat.input[0], f"{y}_shape"), "grouped"),
            ("ReduceMean", (f"{y}_grouped", axes[3]), "channel_means"),
            ("ReduceMean", (f"{y}_channel_means", axes[2]), "mean"),
            ("Sub", (f"{y}_grouped", f"{y}_mean"), "centered"),
            ("Mul", (f"{y}_centered", f"{y}_centered"), "squares"),
            ("ReduceMean", (f"{y}_squares", axes[3]), "channel_variances"),
            ("ReduceMean", (f"{y}_channel_variances", axes[2]), "variance"),
            ("Add", (f"{y}_variance", f"{y}_epsilon"), "stable"),
            ("Sqrt", (f"{y}_stable",), "deviation"),
        ]
        nodes = [make_node(kind, reads, [f"{y}_{makes}"]) for kind, reads, makes in steps]
        nodes.append(make_node("Div", [f"{y}_centered", f"{y}_deviation"], [y], name=norm.name))
        replacements |= {y: nodes, x: []}
    if replacements:
        graph.initializer.extend(
            onnx.numpy_helper.from_array(np.array([axis]), name) for axis, name in axes.items()
        )
        for value in [value for value in graph.value_info if value.name in replacements]:
            graph.value_info.remove(value)  # of another rank now, or gone
    substitute(graph, replacements)
    drop_unread(graph)
    return len(replacements) // 2
