import onnx
import pytest
from onnx import TensorProto, helper

from pn_compiler.export.rewrites.simplify import freeze_reshapes
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
