"""Graphs in onnxruntime's blocked layout: which normalizers are in it, and that they are right."""

import functools
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import pn_compiler
from pn_compiler.base.errors import ExportError
from pn_compiler.export import make_session
from pn_compiler.export.report import count_onnx_operators
from pn_compiler.export.rewrites import blocked
from pn_compiler.export.rewrites.blocked import DOMAIN, block_size, in_blocked_layout
from pn_compiler.export.rewrites.normalizers import use_two_stage_sums
from pn_compiler.export.sessions import session_options
from pn_compiler.testing import randomize_batch_norms
from tests.export.rewriting import apply

BLOCK = block_size()
IMAGES = torch.randn(3, 3, 9, 7, generator=torch.Generator().manual_seed(0))


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
    return Counter(count_onnx_operators(proto))


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


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("before", [nn.Identity, nn.Sigmoid])
def test_channels_that_fill_a_block_do_not_enter_statistics(norm: str, before: type[nn.Module]) -> None:
    """The last block of 24 channels is half empty with blocks of 16, and sigmoid(0) is 0.5."""
    channels = BLOCK + BLOCK // 2
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, channels, 3),
        before(),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 4, 1),
    )
    net = pn_compiler.transform(randomize_batch_norms(nn.Sequential(*layers)), IMAGES, norm=norm)
    with tempfile.TemporaryDirectory() as folder:
        pn_compiler.export_onnx(net, Path(folder, "m.onnx"), IMAGES)
        proto = onnx.load(Path(folder, "m.onnx"))
        report = pn_compiler.export_onnx(net, Path(folder, "b.onnx"), IMAGES, target="ort-cpu")
        assert report.blocked == 1
        actual = run(onnx.load(Path(folder, "b.onnx")), IMAGES.numpy())
    np.testing.assert_allclose(actual, run(proto, IMAGES.numpy()), rtol=1e-5, atol=1e-5)


def test_groups_that_share_a_block_stay_in_the_plain_layout() -> None:
    with pytest.raises(ExportError, match="no normalizer can run in the blocked layout"):
        in_blocked_layout(portable(BLOCK, 2))
    with pytest.raises(ExportError, match="no normalizer"):  # the last block is half empty
        in_blocked_layout(portable(BLOCK + BLOCK // 2), one_image=False)


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
        "three": np.array([3]), "rows": np.arange(8, dtype=np.float32), "one": np.ones(1, np.float32),
        "two_": np.full(1, 2, np.float32), "half": np.full((1, 1, 1), 0.5, np.float32),
    }  # fmt: skip
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["x", "w"], ["y"]), make("Reshape", ["y", "entry"], ["a"]),
        make("Mul", ["a", "two_"], ["y'"]), *inner,
        make("Reshape", ["b", "leave"], ["c"]), make("Conv", ["c", "v"], ["z"]),
    ]  # fmt: skip
    graph = onnx.helper.make_graph(
        nodes, "g", [onnx.helper.make_tensor_value_info("x", 1, ["batch", 3, 4, 8])],
        [onnx.helper.make_tensor_value_info("z", 1, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(proto)


def node(op_type: str, *inputs: str, to: str) -> onnx.NodeProto:
    return onnx.helper.make_node(op_type, inputs, [to])


def mean(source: str, to: str, axes: tuple[str, str] = ("three", "two")) -> list[onnx.NodeProto]:
    return [node("ReduceMean", source, axes[0], to=f"{to}'"), node("ReduceMean", f"{to}'", axes[1], to=to)]


def chain(d: str, squares: list[onnx.NodeProto], power: str = "p") -> list[onnx.NodeProto]:
    """`d` divided by the root of `power` + 1; `squares` computes that of "s", the square of `d`."""
    ends = [
        node("Add", power, "one", to="e"), node("Sqrt", "e", to="r"), node("Reciprocal", "r", to="i"),
        node("Mul", d, "i", to="b"),
    ]  # fmt: skip
    return [node("Mul", d, d, to="s"), *squares, *ends]


GROUPED, FLAT, IMAGE = [0, 1, 2 * BLOCK, -1], [0, 1, -1], [-1, 2 * BLOCK, 4, 8]
ORDERED = {
    "an instance norm": ([node("InstanceNormalization", "a", "ones", "zeros", to="b")], FLAT, IMAGE, True),
    "a mean square": (chain("a", mean("s", "p")), GROUPED, IMAGE, True),
    "a share of it": (
        chain("a", [*mean("s", "m"), node("Mul", "m", "half", to="p")]), GROUPED, IMAGE, True,
    ),
    "a variance": ([*mean("a", "m"), node("Sub", "a", "m", to="d"), *chain("d", mean("s", "p"))],
                   GROUPED, IMAGE, True),
    "another shape behind": (
        [node("InstanceNormalization", "a", "ones", "zeros", to="b")], FLAT, [-1, BLOCK, 8, 8], False,
    ),
    "means of channels": (
        chain("a", [node("ReduceMean", "s", "three", to="p")]), GROUPED, IMAGE, False,
    ),
    "means of pixels": (chain("a", mean("s", "p", ("two", "two"))), GROUPED, IMAGE, False),
    "a share for each element": (
        chain("a", [*mean("s", "m"), node("Mul", "m", "rows", to="p")]), [0, 1, 8 * BLOCK, 8], IMAGE, False,
    ),
    "rows of two channels": (chain("a", mean("s", "p")), [0, 1, BLOCK, -1], IMAGE, False),
    "another mean": ([*mean("y'", "m"), node("Sub", "a", "m", to="d"), *chain("d", mean("s", "p"))],
                     GROUPED, IMAGE, False),
    "a softmax": ([node("Softmax", "a", to="b")], FLAT, IMAGE, False),
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


LEVELS = [name for name in dir(onnxruntime.GraphOptimizationLevel) if name.startswith("ORT_")]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("block", [BLOCK // 2, BLOCK, 2 * BLOCK])
def test_a_file_for_another_size_of_blocks_is_not_loaded(
    block: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "block_size", lambda: block)
    result, _ = in_blocked_layout(portable(2 * BLOCK))
    options = session_options(threads=1)
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    load = functools.partial(
        onnxruntime.InferenceSession, result.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    if block == BLOCK:
        load()
        return
    with pytest.raises(Exception, match=f"with blocks of {block} channels: compile it again on this machine"):
        load()


def test_a_machine_without_blocks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "DOMAIN", "com.example.missing")
    with pytest.raises(ExportError, match="no blocked layout on this machine: use target portable"):
        block_size()


def two_of_two(mixes: bool = False) -> nn.Module:
    class Net(nn.Module):
        """Two inputs and two outputs; the second output may take the mean over the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, BLOCK, 3), nn.BatchNorm2d(BLOCK), nn.ReLU())
            self.head = nn.Conv2d(BLOCK, 4, 1)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.head(self.body(x)).mean((2, 3)) * scale
            return y, (y - y.mean(0) if mixes else y + 1)

    torch.manual_seed(0)
    return pn_compiler.transform(randomize_batch_norms(Net()), (IMAGES, IMAGES[:, :1, 0, 0]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_batch_is_run_image_by_image(tmp_path: Path, dynamic: bool) -> None:
    """Names and shapes are those of the file for all runtimes; one image needs no loop."""
    net, path = two_of_two(), tmp_path / "m.onnx"
    images = IMAGES if dynamic else IMAGES[:1]
    inputs = images, images[:, :1, 0, 0].contiguous()
    report = pn_compiler.export_onnx(net, path, inputs, target="ort-cpu", dynamic_batch=dynamic)
    assert report.operators_after.get("Scan", 0) == dynamic
    assert report.operators_after["Conv"] == 4  # two, the squares, and the weight
    assert [value["name"] for value in report.inputs] == ["x", "scale"]
    assert [value["shape"][0] for value in report.outputs] == (["batch"] * 2 if dynamic else [1] * 2)
    session = make_session(path.read_bytes(), threads=1)
    with torch.no_grad():
        expected = net.eval()(*inputs)
    for actual, value in zip(
        session.run(None, {"x": inputs[0].numpy(), "scale": inputs[1].numpy()}), expected, strict=True
    ):
        np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-5)
