import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import pn_compiler
from pn_compiler.export import make_session
from pn_compiler.export.rewrites.depthwise_affine import use_depthwise_affines
from tests.export.rewriting import apply


def model(
    weight: tuple[int, ...] = (8, 1, 1),
    bias: tuple[int, ...] = (8, 1, 1),
    *,
    shape: tuple[int | str, ...] = ("batch", 8, 5, 4),
    swapped: bool = False,
    second: str = "Add",
    product_is_output: bool = False,
    read_twice: bool = False,
) -> onnx.ModelProto:
    """x * weight + bias, then Relu."""
    generator = np.random.default_rng(0)
    constants = [
        onnx.numpy_helper.from_array(generator.normal(size=size).astype(np.float32), name)
        for name, size in (("weight", weight), ("bias", bias))
    ]
    order = -1 if swapped else 1
    nodes = [
        helper.make_node("Mul", ["x", "weight"][::order], ["product"]),
        helper.make_node(second, ["product", "bias"][::order], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    outputs = ["z"]
    if read_twice:
        nodes.append(helper.make_node("Relu", ["product"], ["w"]))
        outputs.append("w")
    if product_is_output:
        outputs.append("product")
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs], constants,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("size", [(8, 1, 1), (1, 8, 1, 1)])
def test_scale_and_shift_become_one_convolution(size: tuple[int, ...], swapped: bool) -> None:
    proto = model(size, size, swapped=swapped)
    before = onnx.ModelProto()
    before.CopyFrom(proto)
    assert apply(use_depthwise_affines, proto) == 1
    onnx.checker.check_model(proto, full_check=True)
    assert [node.op_type for node in proto.graph.node] == ["Conv", "Relu"]
    assert len(proto.graph.initializer) == 2  # the old ones are gone
    x = np.random.default_rng(1).normal(size=(3, 8, 5, 4)).astype(np.float32)
    (expected,) = ReferenceEvaluator(before).run(None, {"x": x})
    (actual,) = make_session(proto.SerializeToString(), threads=1).run(None, {"x": x})
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    assert apply(use_depthwise_affines, proto) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"shape": ("batch", 8, 5)},  # no image: a Conv has weights [C, 1, 1] there
        {"shape": ("batch", 8, 5, 4, 3)},
        {"weight": (1, 1, 1)},
        {"weight": (1, 1, 1), "bias": (1, 1, 1)},  # one number
        {"weight": (8, 5, 4), "bias": (8, 5, 4)},  # not per channel
        {"second": "Sub"},
        {"product_is_output": True},
        {"read_twice": True},
    ],
)
def test_the_rest_is_left_alone(options: dict[str, object]) -> None:
    proto = model(**options)  # type: ignore[arg-type]
    before = proto.SerializeToString()
    assert apply(use_depthwise_affines, proto) == 0
    assert proto.SerializeToString() == before


@pytest.mark.parametrize(
    ("channels", "external_data"),
    [(4, False), (24, False), (320, True)],  # onnxruntime's blocks have 8 or 16 channels
)
def test_every_normalizer_of_a_file_has_one(tmp_path, channels: int, external_data: bool) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.GroupNorm(2, channels), nn.ReLU(), nn.Conv2d(channels, 8, 3),
        nn.GroupNorm(1, 8), nn.SiLU(),
    )  # fmt: skip
    torch.manual_seed(0)
    for norm in (net[1], net[4]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    report = pn_compiler.export_onnx(
        net, tmp_path / "m.onnx", torch.randn(2, 3, 12, 12), external_data=external_data
    )
    assert report.operators_after["Conv"] == 4
    assert report.operators_after.get("Mul", 0) == 1  # of SiLU
    assert "Add" not in report.operators_after
    assert report.max_error <= 1e-5
