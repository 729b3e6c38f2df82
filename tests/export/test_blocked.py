"""Graphs in onnxruntime's blocked layout: which normalizers are in it, and that they are right."""

import functools
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import pn_compiler
from pn_compiler.base.errors import ExportError
from pn_compiler.export import make_session
from pn_compiler.export.rewrites import blocked
from pn_compiler.export.rewrites.blocked import DOMAIN, block_size, in_blocked_layout
from pn_compiler.export.rewrites.normalizers import use_two_stage_sums
from pn_compiler.testing import randomize_batch_norms
from tests.export.rewriting import apply

BLOCK = block_size()


def portable(channels: int, groups: int = 1, *, act: type[nn.Module] = nn.ReLU) -> onnx.ModelProto:
    """Two normalizers, one of them before a residual sum."""
    return onnx.load_from_string(compiled(channels, groups, act))


@functools.cache
def compiled(channels: int, groups: int, act: type[nn.Module]) -> bytes:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), act())
            self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
            self.head = nn.Sequential(act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.head(y + self.second(y))

    torch.manual_seed(0)
    net = randomize_batch_norms(Block()).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        pn_compiler.compile(net, path, torch.randn(2, 3, 9, 7), num_groups=groups)
        return path.read_bytes()


def operators(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def run(proto: onnx.ModelProto, x: np.ndarray, *, optimized: bool = False) -> np.ndarray:
    session = make_session(proto.SerializeToString(), optimized=optimized, threads=1)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("two_stage", [False, True])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batch", [1, 5])
def test_normalizers_of_whole_blocks_need_no_reordering(
    groups: int, act: type[nn.Module], two_stage: bool, batch: int
) -> None:
    proto = portable(2 * BLOCK, groups, act=act)
    x = np.random.default_rng(0).normal(size=(batch, 3, 9, 7)).astype(np.float32)
    expected = run(proto, x)
    if two_stage:
        apply(use_two_stage_sums, proto)
    result, count = in_blocked_layout(proto)
    assert count == 2
    assert operators(result)["ReorderOutput"] == 1  # before the mean over pixels
    assert operators(result)["ReorderInput"] == 1  # the probe
    for optimized in (False, True):
        np.testing.assert_allclose(run(result, x, optimized=optimized), expected, rtol=1e-5, atol=1e-5)


def test_padded_channels_do_not_enter_statistics() -> None:
    """The last block of 24 channels is half empty with blocks of 16: the plain layout is kept there."""
    channels = BLOCK + BLOCK // 2
    with pytest.raises(ExportError, match="no normalizer can run in the blocked layout"):
        in_blocked_layout(portable(channels))
    with pytest.raises(ExportError, match="no normalizer"):  # a group is half a block
        in_blocked_layout(portable(BLOCK, 2))


def by_hand(inner: list[onnx.NodeProto], entry: list[int], leave: list[int]) -> onnx.ModelProto:
    """Conv, Reshape to `entry`, `inner` from "a" to "b", Reshape to `leave`, Conv."""
    channels = 2 * BLOCK
    shapes = {"entry": entry, "leave": leave}
    weights = {"w": (channels, 3, 1, 1), "v": (4, leave[1], 1, 1)}
    generator = np.random.default_rng(0)
    constants = {name: np.array(value) for name, value in shapes.items()}
    constants |= {k: generator.normal(size=size).astype(np.float32) for k, size in weights.items()}
    constants |= {
        "ones": np.ones(1, np.float32), "zeros": np.zeros(1, np.float32), "two": np.array([2]),
        "three": np.array([3]), "rows": np.arange(8, dtype=np.float32),
    }  # fmt: skip
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["x", "w"], ["y"]), make("Reshape", ["y", "entry"], ["a"]), *inner,
        make("Reshape", ["b", "leave"], ["c"]), make("Conv", ["c", "v"], ["z"]),
    ]  # fmt: skip
    graph = onnx.helper.make_graph(
        nodes, "g", [onnx.helper.make_tensor_value_info("x", 1, ["batch", 3, 4, 8])],
        [onnx.helper.make_tensor_value_info("z", 1, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(proto)


NORM = onnx.helper.make_node("InstanceNormalization", ["a", "ones", "zeros"], ["n"])
SUB = onnx.helper.make_node("Sub", ["a", "m"], ["b"])


def rename(node: onnx.NodeProto, output: str) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.output[0] = output
    return copy


def mean(axis: str, source: str = "a", result: str = "m") -> onnx.NodeProto:
    return onnx.helper.make_node("ReduceMean", [source, axis], [result])


ORDERED = {
    "whole": ([rename(NORM, "b")], [0, 1, -1], [-1, 2 * BLOCK, 4, 8], True),
    "mean": ([mean("two"), SUB], [0, 1, -1], [-1, 2 * BLOCK, 4, 8], True),
    "mean of means": (
        [mean("three", "a", "k"), mean("two", "k"), SUB], [0, 1, 2 * BLOCK, -1], [-1, 2 * BLOCK, 4, 8], True,
    ),
    "another shape behind": ([rename(NORM, "b")], [0, 1, -1], [-1, BLOCK, 8, 8], False),
    "means of channels": ([mean("three"), SUB], [0, 1, 2 * BLOCK, -1], [-1, 2 * BLOCK, 4, 8], False),
    "means of pixels": ([mean("two"), SUB], [0, 1, 2 * BLOCK, -1], [-1, 2 * BLOCK, 4, 8], False),
    "a weight for each element": (
        [NORM, onnx.helper.make_node("Mul", ["n", "rows"], ["b"])],
        [0, 1, 8 * BLOCK, 8], [-1, 2 * BLOCK, 4, 8], False,
    ),
    "a softmax": (
        [onnx.helper.make_node("Softmax", ["a"], ["b"])], [0, 1, -1], [-1, 2 * BLOCK, 4, 8], False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERED)
def test_only_what_ignores_the_order_of_elements(name: str) -> None:
    inner, entry, leave, fits = ORDERED[name]
    proto = by_hand(inner, entry, leave)
    if not fits:
        with pytest.raises(ExportError, match="no normalizer"):
            in_blocked_layout(proto)
        return
    result, count = in_blocked_layout(proto)
    assert count == 1
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 8)).astype(np.float32)
    np.testing.assert_allclose(run(result, x), run(proto, x), rtol=1e-5, atol=1e-5)


def test_the_input_is_left_alone_and_only_used_domains_are_declared() -> None:
    proto = portable(BLOCK)
    before = proto.SerializeToString(deterministic=True)
    result, _ = in_blocked_layout(proto)
    assert proto.SerializeToString(deterministic=True) == before
    assert {entry.domain for entry in result.opset_import} == {"", DOMAIN}
    assert result.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("optimized", [False, True])
def test_a_file_for_another_size_of_blocks_says_so(optimized: bool) -> None:
    result, _ = in_blocked_layout(portable(BLOCK))
    (expected,) = [t for t in result.graph.initializer if t.name == "block_size_expected"]
    expected.CopyFrom(onnx.numpy_helper.from_array(np.array([2 * BLOCK]), expected.name))
    with pytest.raises(Exception, match=f"with blocks of {BLOCK} channels: compile it again on this machine"):
        run(result, np.zeros((1, 3, 9, 7), np.float32), optimized=optimized)


def test_a_machine_without_blocks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "DOMAIN", "com.example.missing")
    with pytest.raises(ExportError, match="no blocked layout on this machine: use target portable"):
        block_size()
