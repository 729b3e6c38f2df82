"""Small rewrites of an ONNX model that the exporter leaves undone."""

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pn_compiler.export.rewrites.rules import contents, is_constant, sizes


def freeze_reshapes(model: onnx_ir.Model) -> int:
    """Replaces Reshape(x, Shape(y)) by a Reshape to a constant, where y has one unknown axis at most.

    The exporter restores the shape behind a normalizer with such a pair; with only the batch unknown the
    constant is [-1, C, H, W]. onnxscript's MaterializeReshapeShape needs to know the shape of the result,
    which the exporter did not infer. It is noted here, whatever is unknown.

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
        reshapes = [reader for reader, place in uses if reader.op_type == "Reshape" and place == 1]
        if source.shape is None:
            continue
        for reader in reshapes:
            reader.outputs[0].shape = source.shape.copy()  # so far of unknown sizes
        if shape.count(-1) > 1 or 0 in shape or len(reshapes) < len(uses) or result.is_graph_output():
            continue
        constant = tape.initializer(onnx_ir.tensor(np.array(shape, np.int64)), result.name)
        onnx_ir.convenience.replace_all_uses_with(result, constant)
        model.graph.remove(node, safe=True)
        frozen += 1
    return frozen


def drop_plain_affines(model: onnx_ir.Model) -> int:
    """Removes each x * 1 + 0, which torch.onnx writes for a normalizer without weight and bias.

    Args:
        model: edited in place; the rank of x must be known.

    Returns:
        How many pairs went.
    """
    dropped = 0
    for product in [node for node in model.graph if node.op_type == "Mul"]:
        uses = list(product.outputs[0].uses())
        if len(uses) != 1 or uses[0][0].op_type != "Add" or product.outputs[0].is_graph_output():
            continue
        total, x = uses[0][0], product.inputs[0]
        plain = _is_all(product.inputs[1], 1, x) and _is_all(total.inputs[1 - uses[0][1]], 0, x)
        if x is None or not plain or total.outputs[0].is_graph_output():
            continue
        onnx_ir.convenience.replace_all_uses_with(total.outputs[0], x)
        model.graph.remove([product, total], safe=True)
        dropped += 1
    if dropped:
        RemoveUnusedNodesPass()(model)
    return dropped


def _is_all(constant: onnx_ir.Value | None, number: int, x: onnx_ir.Value | None) -> bool:
    """Whether `constant` is nothing but `number`, and has an axis only where `x` has one as long."""
    if constant is None or x is None or not is_constant(constant):
        return False
    values, shape = contents(constant), sizes(x)
    fits = values.ndim <= len(shape) and all(
        size in (1, of_x) for size, of_x in zip(values.shape[::-1], shape[::-1], strict=False)
    )
    return fits and bool((values == number).all())


def _is_whole_shape(node: onnx_ir.Node) -> bool:
    attributes = node.attributes.values()
    return node.op_type == "Shape" and all((a.name, a.value) == ("start", 0) for a in attributes)
