"""Real networks, written for several targets, in OpenVINO and in ONNX's reference evaluator."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import pn_compiler
from benchmarks.variants import build
from pn_compiler.export import relative_error
from pn_compiler.testing import randomize_batch_norms
from tests import zoo

openvino: Any = pytest.importorskip("openvino", reason="OpenVINO is not installed")
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("unet", "portable"),
        ("unet", "openvino"),
        ("unet", "cuda"),  # tensorrt gets the same file
        ("small mobilenet", "openvino"),
        pytest.param("mobilenet_v2", "openvino", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", "portable", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", "cuda", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", "openvino", marks=pytest.mark.slow),
    ],
)
def test_all_runtimes_agree(tmp_path: Path, name: str, target) -> None:
    channels, pixels = (1, 32) if name == "unet" else (3, 64)
    x = torch.randn(3, channels, pixels, pixels, generator=torch.Generator().manual_seed(0))
    if name == "small mobilenet":
        network = randomize_batch_norms(zoo.small("mobilenet")).eval()
    else:
        network = build(name)
    converted = pn_compiler.transform(network, x)
    path = tmp_path / "m.onnx"
    pn_compiler.export_onnx(converted, path, x, target=target)
    with torch.no_grad():
        expected = converted.double().eval()(x.double()).numpy()
    compiled = openvino.compile_model(str(path), "CPU", SETTINGS)
    for batch in (1, 3):
        assert relative_error(compiled([x[:batch].numpy()])[0], expected[:batch]) < 1e-4
    proto = onnx.load(path)
    (actual,) = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x[:1].numpy()})
    assert relative_error(actual, expected[:1]) < 1e-4


class Residual(nn.Module):
    """Two residual sums of normalizers in a row: OpenVINO 2026.4 crashes on GroupNormalization there."""

    def __init__(self, dims: int = 2, channels: int = 16) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.stem = conv(3, channels, 3)
        self.branches = nn.ModuleList(
            nn.Sequential(conv(channels, channels, 1), norm(channels), nn.ReLU(), conv(channels, channels, 1),
                          norm(channels)) for _ in range(2)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return x


def written(path: Path, x: Tensor, net: nn.Module, options: dict[str, Any], **how: Any) -> np.ndarray:
    """Writes a file for OpenVINO, and returns what the network gives in float64."""
    converted = pn_compiler.transform(randomize_batch_norms(net).eval(), x, **options)
    pn_compiler.export_onnx(converted, path, x, target="openvino", **how)
    with torch.no_grad():
        return converted.double().eval()(x.double()).numpy()


NORMS = {"layer": {"norm": "layer"}, "rms": {"norm": "rms"}, "group": {"norm": "group", "num_groups": 4}}
RUN = f"""
import sys, numpy, openvino
folder = sys.argv[1]
compiled = openvino.compile_model(f"{{folder}}/m.onnx", "CPU", {SETTINGS})
numpy.save(f"{{folder}}/y.npy", compiled([numpy.load(f"{{folder}}/x.npy")])[0])
"""


@pytest.mark.parametrize("norm", NORMS)
def test_a_fixed_batch_does_not_crash(tmp_path: Path, norm: str) -> None:
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = written(tmp_path / "m.onnx", x, Residual(), NORMS[norm], dynamic_batch=False)
    np.save(tmp_path / "x.npy", x.numpy())
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], check=True)  # a crash would end pytest
    assert relative_error(np.load(tmp_path / "y.npy"), expected) < 1e-5


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_each_normalizer_is_one_kernel(tmp_path: Path, norm: str, dims: int) -> None:
    path = tmp_path / "m.onnx"
    x = torch.randn(3, 3, *[8] * dims, generator=torch.Generator().manual_seed(0))
    expected = written(path, x, Residual(dims), NORMS[norm])
    compiled = openvino.compile_model(str(path), "CPU", SETTINGS)
    assert relative_error(compiled([x.numpy()])[0], expected) < 1e-5
    kernels = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    if (norm, dims) != ("rms", 3):  # OpenVINO's NormalizeL2 takes four axes at most
        assert kernels.count({"layer": "MVN", "rms": "NormalizeL2"}[norm]) == 4
