import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pn_compiler.export.rewrites.simplify import drop_plain_affines, freeze_reshapes
from tests.export.rewriting import apply


def model(shape: list[int | str], *, gathered: bool = False) -> onnx.ModelProto:
    """Reshape(Relu(x) flattened, Shape(x)), and if asked for another reader of the shape."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    flat = helper.make_tensor("flat", TensorProto.INT64, [1], [-1])
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["y"]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Reshape", ["y", "shape"], ["z"]),
    ]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, shape)]
    if gathered:
        nodes.append(helper.make_node("Size", ["shape"], ["rank"]))
        outputs.append(helper.make_tensor_value_info("rank", TensorProto.INT64, []))
    graph = helper.make_graph(nodes, "g", [x], outputs, [flat])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_one_unknown_axis_is_frozen() -> None:
    proto = model(["batch", 3, 4])
    assert apply(freeze_reshapes, proto) == 1
    onnx.checker.check_model(proto, full_check=True)
    (constant,) = [t for t in proto.graph.initializer if t.name == "shape"]
    assert onnx.numpy_helper.to_array(constant).tolist() == [-1, 3, 4]
    assert apply(freeze_reshapes, proto) == 0


@pytest.mark.parametrize(
    ("shape", "gathered"),
    [(["batch", "length", 4], False), (["batch", 0, 4], False), (["b", 3, 4], True)],
)
def test_the_rest_is_left_alone(shape: list[int | str], gathered: bool) -> None:
    proto = model(shape, gathered=gathered)
    before = proto.SerializeToString()
    assert apply(freeze_reshapes, proto) == 0
    assert proto.SerializeToString() == before


def affine(
    scale: list[float], shift: list[float], shape: list[int], *, last: bool = False
) -> onnx.ModelProto:
    """Relu(Relu(x) * scale + shift), or without the second Relu, of [batch, 3, length]."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "length"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4 if len(shape) > 3 else [None] * 3)
    relu = helper.make_tensor_value_info("r", TensorProto.FLOAT, ["batch", 3, "length"])
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Mul", ["r", "scale"], ["m"]),
        helper.make_node("Add", ["shift", "m"], ["y" if last else "a"]),
        *([] if last else [helper.make_node("Relu", ["a"], ["y"])]),
    ]
    constants = [
        helper.make_tensor(name, TensorProto.FLOAT, shape, values)
        for name, values in {"scale": scale, "shift": shift}.items()
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], constants, value_info=[relu])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_a_product_with_one_and_a_sum_with_zero_go() -> None:
    proto = affine([1.0] * 3, [0.0] * 3, [3, 1])
    assert apply(drop_plain_affines, proto) == 1
    assert [node.op_type for node in proto.graph.node] == ["Relu", "Relu"]
    assert not proto.graph.initializer
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    onnx.checker.check_model(proto, full_check=True)
    (y,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})
    assert (y == np.maximum(x, 0)).all()


@pytest.mark.parametrize(
    ("scale", "shift", "shape", "last"),
    [
        ([1.0, 1.0, 1.1], [0.0] * 3, [3, 1], False),
        ([1.0] * 3, [0.0, 0.1, 0.0], [3, 1], False),
        ([1.0] * 3, [0.0] * 3, [1, 3, 1, 1], False),  # an axis more
        ([1.0] * 3, [0.0] * 3, [3], False),  # as many as the length, which is unknown
        ([1.0] * 3, [0.0] * 3, [3, 1], True),  # the result is an output
    ],
)
def test_other_products_and_sums_stay(
    scale: list[float], shift: list[float], shape: list[int], last: bool
) -> None:
    proto = affine(scale, shift, shape, last=last)
    before = proto.SerializeToString()
    assert apply(drop_plain_affines, proto) == 0
    assert proto.SerializeToString() == before
