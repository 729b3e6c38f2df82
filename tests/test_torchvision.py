"""Real networks through the command line, to the figures that the project promises."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import pn_compiler
from pn_compiler import cli
from pn_compiler.testing import randomize_batch_norms
from tests import zoo

PROXY_SITES = {
    "resnet18": 8, "resnet50": 33, "mobilenet_v2": 35, "efficientnet_b0": 17, "densenet121": 120,
    "shufflenet_v2_x1_0": 18, "regnet_y_400mf": 17,
}  # fmt: skip
SHORT = {"short resnet50": 11, "short mobilenet_v2": 9}  # every kind of block, without most repetitions


def network(name: str, **options: Any) -> nn.Module:
    models = zoo.torchvision().models
    if name == "short resnet50":
        made = models.ResNet(models.resnet.Bottleneck, [2, 1, 1, 1], **options)
    elif name == "short mobilenet_v2":
        blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]
        made = models.MobileNetV2(inverted_residual_setting=blocks, **options)
    else:
        made = getattr(models, name)(weights=None, num_classes=1000, **options)
    assert isinstance(made, nn.Module)
    return made


QUICK = [(name, 64) for name in (*SHORT, "efficientnet_b0")]
WHOLE = [pytest.param(name, 224, marks=pytest.mark.slow) for name in PROXY_SITES]


@pytest.mark.parametrize(("name", "pixels"), [*QUICK, *WHOLE])
def test_compiles_to_float32_rounding(
    name: str, pixels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norms(network(name))
    torch.save(model, tmp_path / "model.pt")
    model_file, onnx_file, report_file = (str(tmp_path / name) for name in ("model.pt", "m.onnx", "r.json"))
    shape = f"1,3,{pixels},{pixels}"
    norm = ("--norm", "layer") if "resnet50" in name else ()  # which is compared with LayerNorm below
    status = cli.main([model_file, "-o", onnx_file, "--report", report_file, "--input-shape", shape, *norm])
    assert status == cli.DONE, capsys.readouterr().err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["reference"] == "float64"
    assert {check["batch"] for check in report["checks"]} == {1, 3}
    assert report["max_error"] <= 1e-5
    assert Counter(s["kind"] for s in report["sites"])["pn"] == (PROXY_SITES | SHORT)[name]
    assert not any(s["kind"] == "skipped" for s in report["sites"])
    if "resnet50" in name:
        assert_no_more_elementwise_operators_than_group_norm(name, tmp_path, pixels)


@pytest.mark.parametrize("name", [name for name in PROXY_SITES if name != "efficientnet_b0"])
def test_sites_with_proxy_normalization(name: str) -> None:
    """Of those that are compiled in `make test-all` only."""
    model = randomize_batch_norms(network(name))
    kinds = Counter(site.kind for site in pn_compiler.sites(pn_compiler.transform(model)))
    assert kinds["pn"] == PROXY_SITES[name]
    assert not kinds["skipped"]


ELEMENTWISE = ("Add", "Mul", "Sub", "Div", "Max", "Min", "Relu", "Clip")


def assert_no_more_elementwise_operators_than_group_norm(name: str, tmp_path: Path, pixels: int) -> None:
    """Against the plain export of the same network with GroupNorm in the place of BatchNorm."""
    model = network(name, norm_layer=lambda channels: nn.GroupNorm(1, channels)).eval()
    program = torch.onnx.export(model, (torch.randn(2, 3, pixels, pixels),), opset_version=20, verbose=False)
    assert program is not None
    plain = Counter(node.op_type for node in program.model_proto.graph.node)
    ours = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert sum(ours[op] for op in ELEMENTWISE) <= sum(plain[op] for op in ELEMENTWISE)
    assert sum(ours.values()) <= sum(plain.values())


def test_from_scratch_every_activation_gets_proxy_normalization() -> None:
    model = zoo.torchvision().models.efficientnet_b0(weights=None)
    sites = pn_compiler.sites(pn_compiler.transform(model, warm_start="none"))
    assert Counter(site.kind for site in sites) == {"pn": 33, "norm_only": 16}
