"""Real networks, written for several targets, in OpenVINO and in ONNX's reference evaluator."""

from pathlib import Path

import onnx
import openvino
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import pn_compiler
from benchmarks.variants import build
from pn_compiler.export import relative_error


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("unet", "portable"),
        ("unet", "openvino"),  # tensorrt gets the same file
        ("unet", "cuda"),
        ("mobilenet_v2", "openvino"),
        pytest.param("mobilenet_v2", "portable", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", "cuda", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", "openvino", marks=pytest.mark.slow),
    ],
)
def test_all_runtimes_agree(tmp_path: Path, name: str, target) -> None:
    channels = 1 if name == "unet" else 3
    x = torch.randn(3, channels, 64, 64, generator=torch.Generator().manual_seed(0))
    converted = pn_compiler.transform(build(name), x)
    path = tmp_path / "m.onnx"
    pn_compiler.export_onnx(converted, path, x, target=target)
    with torch.no_grad():
        expected = converted.double().eval()(x.double()).numpy()
    compiled = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 3):
        assert relative_error(compiled([x[:batch].numpy()])[0], expected[:batch]) < 1e-4
    proto = onnx.load(path)
    (actual,) = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x[:1].numpy()})
    assert relative_error(actual, expected[:1]) < 1e-4
