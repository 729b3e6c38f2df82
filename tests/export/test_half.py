"""Files in float16 and bfloat16: what is in which dtype, and what verification says of them."""

import copy
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError, VerificationError
from pn_compiler.cli import main
from pn_compiler.export import DType, to_onnx
from pn_compiler.testing import randomize_batch_norms

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FLOAT = onnx.TensorProto.FLOAT
HALF = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
OPSETS = {"float16": 20, "bfloat16": 22}


def network(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 32, 3),
        nn.BatchNorm2d(32), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    with torch.no_grad():
        net[8].weight.mul_(scale)  # type: ignore[union-attr, operator]
    return randomize_batch_norms(net).eval()


@pytest.mark.parametrize("dtype", HALF)
def test_convolutions_are_half_and_normalizers_float32(tmp_path: Path, dtype: str) -> None:
    report = pn_compiler.compile(
        network(), tmp_path / "m.onnx", IMAGES,
        dtype=dtype, warm_start="none", opset_version=OPSETS[dtype],
    )  # fmt: skip
    proto = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "m.onnx"))
    types = {v.name: v.type.tensor_type.elem_type for v in (*proto.graph.value_info, *proto.graph.input)}
    types |= {t.name: t.data_type for t in proto.graph.initializer}
    seen = set()
    for node in proto.graph.node:
        if node.op_type in ("Conv", "InstanceNormalization", "GroupNormalization", "Sigmoid"):
            affine = any(a.name == "group" and a.i > 1 for a in node.attribute)  # of a normalizer
            expected = FLOAT if affine or node.op_type.endswith("Normalization") else HALF[dtype]
            assert {types[name] for name in node.input} == {expected}, node.op_type
            seen.add(node.op_type)
    assert len(seen) == 3
    assert [v["dtype"] for v in (*report.inputs, *report.outputs)] == ["float", "float"]
    assert report.dtype == dtype
    own = min(4 * (report.float32_error or 0), 1e-2)
    assert report.tolerance == max(4 * torch.finfo(getattr(torch, dtype)).eps, own)
    assert report.max_error is not None
    assert 1e-5 < report.max_error < report.tolerance  # rounding shows, and no more than it
    assert f"PyTorch's own in {dtype}" in str(report)
    runtime = "onnxruntime" if dtype == "float16" else "ONNX's reference evaluator"
    assert report.runtime == runtime
    assert {check.batch for check in report.checks} == {1, 3}


def test_the_file_is_half_the_size(tmp_path: Path) -> None:
    sizes = [
        pn_compiler.compile(
            network(), tmp_path / "m.onnx", IMAGES, dtype=dtype, external_data=True
        ).data_bytes
        for dtype in ("float32", "float16")
    ]
    assert sizes[1] <= 0.5 * sizes[0]


def test_bfloat16_needs_an_opset_that_has_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="opset 20 has no convolution in bfloat16: give opset 22"):
        pn_compiler.compile(network(), tmp_path / "m.onnx", IMAGES, dtype="bfloat16")
    with pytest.raises(ConfigError, match="dtype='int8'"):
        pn_compiler.compile(network(), tmp_path / "m.onnx", IMAGES, dtype="int8")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_network_beyond_the_range_of_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="own output in float16 is not finite"):
        pn_compiler.compile(network(1e7), tmp_path / "m.onnx", IMAGES, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    pn_compiler.compile(network(1e7), tmp_path / "m.onnx", IMAGES, dtype="bfloat16", opset_version=22)


def test_a_wrong_weight_is_found_behind_the_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(model: nn.Module, dtype: torch.dtype) -> nn.Module:
        half = in_half(model, dtype)
        half.get_submodule("8").register_forward_hook(
            lambda *args: args[2] * 1.2 if torch.compiler.is_exporting() else args[2]
        )
        return half

    in_half = to_onnx.in_half
    monkeypatch.setattr(to_onnx, "in_half", damaged)
    with pytest.raises(VerificationError, match="differs from PyTorch by"):
        pn_compiler.compile(network(), tmp_path / "m.onnx", IMAGES, dtype="float16")


def test_command_line(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "m.pt")
    arguments = [str(tmp_path / "m.pt"), "-o", str(tmp_path / "m.onnx"), "--input-shape", "1,3,8,8"]
    report = tmp_path / "r.json"
    assert main([*arguments, "--dtype", "float16", "--external-data", "--report", str(report)]) == 0
    content = json.loads(report.read_text())
    assert content["dtype"] == "float16"
    assert content["data_bytes"] == (tmp_path / "m.onnx.data").stat().st_size


STARTS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "linear": ([nn.Linear(5, 8)], (2, 5)),
    "linear without bias": ([nn.Linear(5, 8, bias=False)], (2, 5)),
    "flatten": ([nn.Flatten(), nn.Linear(12, 8)], (2, 3, 2, 2)),
    "batch norm": ([nn.BatchNorm1d(5), nn.Linear(5, 8)], (2, 5)),
    "batch norm of images": ([nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 8)], (2, 3, 2, 2)),
    "layer norm": ([nn.LayerNorm(5), nn.Linear(5, 8)], (2, 5)),
    "activation": ([nn.Tanh(), nn.Linear(5, 8)], (2, 5)),
    "transposed convolution": ([nn.ConvTranspose2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 8)], (2, 3, 2, 2)),
    "convolution": ([nn.Conv1d(3, 2, 2), nn.Flatten(), nn.Linear(4, 8)], (2, 3, 3)),
    "one feature": ([nn.Linear(5, 1), nn.Linear(1, 8)], (2, 5)),
}


@pytest.mark.parametrize(
    ("start", "dtype", "program"),
    [
        *((start, "float16", False) for start in STARTS),
        ("linear", "bfloat16", False), ("transposed convolution", "bfloat16", False),
        ("batch norm", "float16", True),
    ],
)  # fmt: skip
def test_networks_of_any_start(start: str, dtype: DType, program: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers, shape = STARTS[start]
    tail = (nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    net: nn.Module = randomize_batch_norms(nn.Sequential(*copy.deepcopy(layers), *tail)).eval()
    x = torch.randn(shape)
    if program:
        net = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    report = pn_compiler.compile(net, tmp_path / "m.onnx", x, dtype=dtype, opset_version=OPSETS[dtype])
    assert report.max_error is not None
    assert report.max_error < 8 * torch.finfo(getattr(torch, dtype)).eps
    types = {t.name: t.data_type for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    products = [n for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type in ("Gemm", "MatMul")]
    assert products
    assert {types.get(node.input[1], HALF[dtype]) for node in products} == {HALF[dtype]}
    assert [v["dtype"] for v in (*report.inputs, *report.outputs)] == ["float", "float"]


class Embeds(nn.Module):
    """Integers and floats in, several outputs out, in a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.bn = nn.Embedding(10, 5), nn.Linear(5, 8), nn.BatchNorm1d(8)

    def forward(self, words: Tensor, x: Tensor) -> dict[str, Any]:
        y = F.relu(self.bn(self.linear(self.table(words)) + x))
        return {"features": y, "more": (words, y.sum(1))}


def test_integers_stay_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = randomize_batch_norms(Embeds()).eval()
    inputs = (torch.tensor([1, 7]), torch.randn(2, 8))
    report = pn_compiler.compile(net, tmp_path / "m.onnx", inputs, dtype="float16")
    assert [v["dtype"] for v in report.inputs] == ["int64", "float"]
    assert sorted(v["dtype"] for v in report.outputs) == ["float", "float", "int64"]
