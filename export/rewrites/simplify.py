"""Small rewrites of an ONNX model that the exporter leaves undone."""

import numpy as np
import onnx_ir

from pn_compiler.export.rewrites.rules import sizes


def freeze_reshapes(model: onnx_ir.Model) -> int:
    """Replaces Reshape(x, Shape(y)) by a Reshape to a constant, where y has one unknown axis at most.

    The exporter restores the shape behind a normalizer with such a pair; with only the batch unknown the
    constant is [-1, C, H, W]. onnxscript's MaterializeReshapeShape needs to know the shape of the result,
    which the exporter did not infer.

    Args:
        model: edited in place; its shapes must be known.

    Returns:
        How many Shape nodes went.
    """
    tape = onnx_ir.tape.Tape(model.graph)
    frozen = 0
    for node in [node for node in model.graph if _is_whole_shape(node)]:
        source, result = node.inputs[0], node.outputs[0]
        assert source is not None
        shape, uses = sizes(source), list(result.uses())
        only_reshapes = all(reader.op_type == "Reshape" and place == 1 for reader, place in uses)
        if source.shape is None or shape.count(-1) > 1 or 0 in shape:
            continue
        if not only_reshapes or result.is_graph_output():
            continue
        for reader, _ in uses:
            reader.outputs[0].shape = source.shape.copy()  # so far of unknown sizes
        constant = tape.initializer(onnx_ir.tensor(np.array(shape, np.int64)), result.name)
        onnx_ir.convenience.replace_all_uses_with(result, constant)
        model.graph.remove(node, safe=True)
        frozen += 1
    return frozen


def _is_whole_shape(node: onnx_ir.Node) -> bool:
    attributes = node.attributes.values()
    return node.op_type == "Shape" and all((a.name, a.value) == ("start", 0) for a in attributes)
