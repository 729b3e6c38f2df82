"""Normalizers rewritten in ONNX compute what they did, in fewer or other operators."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import pn_compiler
from pn_compiler.export import make_session
from pn_compiler.export.rewrites.normalizers import expand_group_norms, pool_squares, use_two_stage_sums
from pn_compiler.nn import FoldedNorm
from tests.export.rewriting import apply

CHANNELS = 8


def group_norm(
    groups: int, shape: tuple[int | str, ...] = ("batch", CHANNELS, 5, 4), *, constant: bool = True
) -> onnx.ModelProto:
    """GroupNormalization of opset 21."""
    generator = np.random.default_rng(0)
    parameters = ("weight", "bias")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    constants = [
        onnx.numpy_helper.from_array(generator.normal(size=CHANNELS).astype(np.float32), name)
        for name in parameters
    ]
    if not constant:
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [CHANNELS]) for name in parameters]
    node = helper.make_node("GroupNormalization", ["x", *parameters], ["y"], num_groups=groups, epsilon=1e-3)
    graph = helper.make_graph(
        [node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants if constant else [],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def reference(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    (y,) = ReferenceEvaluator(proto).run(None, {"x": x})
    return y


def onnxruntime(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(proto, full_check=True)
    (y,) = make_session(proto.SerializeToString(), threads=1).run(None, {"x": x})
    return y


@pytest.mark.parametrize("groups", [1, 2, CHANNELS])
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_both_rewrites_keep_the_values(groups: int, rank: int) -> None:
    sizes = (5, 4, 3)[: rank - 2]
    proto = group_norm(groups, ("batch", CHANNELS, *sizes))
    x = np.random.default_rng(1).normal(2, 3, size=(3, CHANNELS, *sizes)).astype(np.float32)
    expected = reference(proto, x)
    assert apply(expand_group_norms, proto) == 1
    assert [n.op_type for n in proto.graph.node] == [
        "Reshape", "InstanceNormalization", "Reshape", "Mul", "Add",
    ]  # fmt: skip
    np.testing.assert_allclose(onnxruntime(proto, x), expected, rtol=1e-5, atol=1e-5)
    assert apply(use_two_stage_sums, proto) == 1
    assert "InstanceNormalization" not in {node.op_type for node in proto.graph.node}
    np.testing.assert_allclose(onnxruntime(proto, x), expected, rtol=1e-5, atol=1e-5)
    assert apply(expand_group_norms, proto) == apply(use_two_stage_sums, proto) == 0


def test_zero_variance_gives_the_bias() -> None:
    proto = group_norm(2)
    bias = onnx.numpy_helper.to_array(proto.graph.initializer[1]).reshape(-1, 1, 1)
    apply(expand_group_norms, proto)
    apply(use_two_stage_sums, proto)
    y = onnxruntime(proto, np.full((1, CHANNELS, 5, 4), 7, np.float32))
    np.testing.assert_allclose(y[0], np.broadcast_to(bias, y[0].shape), atol=1e-5)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("sizes", [(5, 4), ("height", "width")])
def test_neither_sizes_nor_weights_need_to_be_known(sizes: tuple[int | str, ...], constant: bool) -> None:
    proto = group_norm(2, ("batch", CHANNELS, *sizes), constant=constant)
    generator = np.random.default_rng(2)
    feed = {"x": generator.normal(size=(3, CHANNELS, 5, 4)).astype(np.float32)}
    if not constant:
        feed |= {name: generator.normal(size=CHANNELS).astype(np.float32) for name in ("weight", "bias")}
    (expected,) = ReferenceEvaluator(proto).run(None, feed)
    assert apply(expand_group_norms, proto) == 1
    (actual,) = make_session(proto.SerializeToString(), threads=1).run(None, feed)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_an_instance_norm_with_a_weight_keeps_it() -> None:
    proto = group_norm(1)
    apply(expand_group_norms, proto)
    (ones,) = [t for t in proto.graph.initializer if t.name == "y_ones"]
    ones.CopyFrom(onnx.numpy_helper.from_array(np.array([2], np.float32), "y_ones"))
    assert apply(use_two_stage_sums, proto) == 0


@pytest.mark.parametrize(("flat", "channels"), [([0, 4, -1], 4), ([-1, 4, 20], 8), ([0, 4, -1], "channels")])
def test_an_instance_norm_of_other_slices_keeps_its_sums(flat: list[int], channels: int | str) -> None:
    """[-1, 4, 20] makes two instances of a sample with 8 channels; the number of channels may be unknown."""
    shape = ["batch", channels, 5, 4]
    constants = {"flat": np.array(flat), "ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["x", "flat"], ["a"]),
            helper.make_node("InstanceNormalization", ["a", "ones", "zeros"], ["b"], epsilon=1e-5),
            helper.make_node("Reshape", ["b", "restored"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            onnx.numpy_helper.from_array(v, k)
            for k, v in (constants | {"restored": np.array([-1, 4, 5, 4])}).items()
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    assert apply(use_two_stage_sums, proto) == (flat[0] == 0 and channels == 4)


def test_two_stages_are_more_exact() -> None:
    """onnxruntime's InstanceNormalization loses 8e-6 over a million values."""
    shape = (1, 64, 128, 128)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.group_norm(x.double(), 1).numpy()
    graph = helper.make_graph(
        [helper.make_node("GroupNormalization", ["x", "w", "b"], ["y"], num_groups=1, epsilon=1e-5)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(np.full(64, v, np.float32), n) for v, n in ((1, "w"), (0, "b"))],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    apply(expand_group_norms, proto)
    one_run = np.abs(onnxruntime(proto, x.numpy()) - expected).max()
    apply(use_two_stage_sums, proto)
    assert np.abs(onnxruntime(proto, x.numpy()) - expected).max() < one_run / 3


def mean_square_norm(shape: tuple[int, ...], *, groups: int = 1, share: float | None = None) -> nn.Module:
    """An anchored site at inference: its mean square needs no mean."""
    channels, generator = shape[1], torch.Generator().manual_seed(0)
    return FoldedNorm(
        groups,
        channels,
        centered=False,
        share=None if share is None else torch.full((groups,), share),
        var=torch.rand(groups, generator=generator) + 0.1,
        shift=None,
        weight=torch.randn(channels, generator=generator),
        bias=torch.randn(channels, generator=generator),
    )


@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize(
    ("shape", "groups", "pools"),
    [((2, 16, 5, 4), 1, 1), ((2, 16, 5, 4), 2, 0), ((2, 24, 5, 4), 1, 0), ((2, 16, 5), 1, 0)],
)
def test_mean_squares_of_images_are_pooled(
    tmp_path: Path, shape: tuple[int, ...], groups: int, pools: int, share: float | None
) -> None:
    net, x = mean_square_norm(shape, groups=groups, share=share), torch.randn(shape)
    report = pn_compiler.export_onnx(net.eval(), tmp_path / "m.onnx", x)
    assert report.operators_after.get("GlobalAveragePool", 0) == pools
    if pools:
        expected = {"Add", "Conv", "GlobalAveragePool", "Mul", "Pow", "ReduceMean"}
        assert report.operators_after.keys() == expected
    y = make_session((tmp_path / "m.onnx").read_bytes(), threads=1).run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(y, net.double()(x.double()).detach(), rtol=1e-5, atol=1e-6)


def test_pooling_needs_a_mean_square() -> None:
    proto = group_norm(1)
    apply(expand_group_norms, proto)
    assert apply(pool_squares, proto) == 0


@pytest.mark.parametrize(("opset", "dtype"), [(20, "float32"), (21, "float32"), (24, "float16")])
def test_no_file_for_onnxruntime_has_a_group_normalization(tmp_path: Path, opset: int, dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    report = pn_compiler.compile(
        net, tmp_path / "m.onnx", torch.randn(2, 3, 9, 9), opset_version=opset, dtype=dtype, norm="layer"
    )
    assert report.operators_after["InstanceNormalization"] == 1
    assert "GroupNormalization" not in report.operators_after
