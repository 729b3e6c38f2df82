"""PRelu rewritten computes the same, and faster."""

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

import pn_compiler
from pn_compiler.export import make_session
from pn_compiler.export.rewrites.prelu import expand_prelus, use_leaky_relus
from tests.export.rewriting import apply

X = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)


def model(slope: np.ndarray, shape: tuple[int | str, ...] = ("batch", 3, 5, 4)) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("PRelu", ["x", "slope"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(slope.astype(np.float32), "slope")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(proto, full_check=True)
    return make_session(proto.SerializeToString(), threads=1).run(None, {"x": x})[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3))
def test_slopes_of_channels_become_convolutions(slopes: list[float]) -> None:
    proto = model(np.array(slopes).reshape(3, 1, 1))
    expected = np.where(X > 0, X, X * np.array(slopes, np.float32).reshape(3, 1, 1))
    assert apply(expand_prelus, proto) == 1
    assert [node.op_type for node in proto.graph.node] == ["Conv", "Relu", "Conv", "Add"]
    np.testing.assert_allclose(run(proto, X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(1,), (1, 1, 1), (1, 3, 1, 1)])
def test_one_slope_becomes_a_leaky_relu(size: tuple[int, ...]) -> None:
    proto = model(np.full(size, 0.3))
    assert apply(use_leaky_relus, proto) == 1
    assert [node.op_type for node in proto.graph.node] == ["LeakyRelu"]
    assert not proto.graph.initializer
    np.testing.assert_allclose(run(proto, X), np.where(X > 0, X, X * np.float32(0.3)), rtol=1e-6)


@pytest.mark.parametrize(
    "proto",
    [model(np.arange(4.0)), model(np.ones((3, 5, 4))), model(np.arange(3.0).reshape(3, 1), ("batch", 3, 5))],
)
def test_the_rest_is_left_alone(proto: onnx.ModelProto) -> None:
    assert apply(expand_prelus, proto) == 0
    assert [node.op_type for node in proto.graph.node] == ["PRelu"]


@pytest.mark.parametrize("target", ["portable", "ort-cpu", "openvino"])
@pytest.mark.parametrize("slopes", [1, 32])
def test_compiled_networks_have_no_slow_prelu(tmp_path: Path, slopes: int, target) -> None:
    act = nn.PReLU(slopes)
    nn.init.uniform_(act.weight, 0.1, 0.4)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), act, nn.Conv2d(32, 4, 1)).eval()
    report = pn_compiler.compile(net, tmp_path / "m.onnx", torch.randn(2, 3, 9, 9), target=target)
    slow = target == "openvino" and slopes > 1  # it has a kernel for it
    assert ("PRelu" in report.operators_after) == slow


def test_it_is_faster() -> None:
    """By a factor of some 10 to 50, of which a third is far; in time of this thread, whatever else runs."""
    shape = (1, 32, 112, 112)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    slow = model(np.linspace(0.1, 0.4, 32).reshape(32, 1, 1), shape)
    fast = onnx.ModelProto()
    fast.CopyFrom(slow)
    apply(expand_prelus, fast)
    seconds = []
    for proto in (slow, fast):
        session = make_session(proto.SerializeToString(), threads=1)
        times = []
        for _ in range(7):
            start = time.thread_time()
            session.run(None, {"x": x})
            times.append(time.thread_time() - start)
        seconds.append(min(times))
        del session
    assert seconds[1] < seconds[0] / 3
