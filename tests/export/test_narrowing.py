"""Normalizers before expansions, in files: which, what is in the graph then, and what the report says."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import pn_compiler
from pn_compiler.export import Report, narrowing
from pn_compiler.nn import FoldedNorm
from pn_compiler.passes.fold.normalize_before_expansion import Expansion
from pn_compiler.running.inputs import Inputs
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests import zoo

#: columns, channels, narrow channels, pixels
EXPANSIONS = {
    "16 -> 96": (16, 96, 32, 112 * 112),
    "24 -> 144": (24, 144, 32, 56 * 56),
    "64 -> 384": (64, 384, 80, 14 * 14),
    "160 -> 960": (160, 960, 176, 7 * 7),
    "64 -> 256": (64, 256, 80, 56 * 56),
    "3x3 of 3 -> 32": (27, 32, 32, 112 * 112),
    "a single pixel": (16, 96, 32, 1),
}
PAYS = {
    "portable": {"16 -> 96", "24 -> 144", "64 -> 384"},
    "ort-cpu": set(),
    "auto": set(),
    "cuda": {"16 -> 96", "24 -> 144", "64 -> 384", "160 -> 960", "64 -> 256", "a single pixel"},
}


@pytest.mark.parametrize("target", PAYS)
def test_which_expansions_pay(target: str) -> None:
    costs = narrowing._COSTS[target]
    found = {
        name: Expansion(columns, channels, 1, narrow, pixels)
        for name, (columns, channels, narrow, pixels) in EXPANSIONS.items()
    }
    assert {name for name, expansion in found.items() if not narrowing.why_not(expansion, costs)} == PAYS[
        target
    ]


@pytest.mark.parametrize(("columns", "pays"), [(15, [1, 2, 4, 8]), (31, [1, 2, 4]), (63, [1])])
def test_groups_pay_while_they_are_few_for_the_columns(columns: int, pays: list[int]) -> None:
    costs = narrowing._COSTS["portable"]
    found = {g: Expansion(columns, 256, g, (columns + 1) * g, 784) for g in (1, 2, 4, 8)}
    assert [g for g, expansion in found.items() if not narrowing.why_not(expansion, costs)] == pays


class Residual(nn.Module):
    """Few channels become many, and few again."""

    def __init__(self, few: int = 3, many: int = 48, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.act = nn.Conv2d(few, many, 1, bias=bias), nn.BatchNorm2d(many), nn.ReLU6()
        self.project = nn.Conv2d(many, few, 1)
        randomize_batch_norms(self).eval()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.act(self.bn(self.conv(x))))


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["layer", "rms"])
def norm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("narrow")


@pytest.fixture(scope="module")
def report(folder: Path, norm: str) -> Report:
    options: Any = {"norm": norm, "dynamic_axes": ("H", "W")}
    return pn_compiler.compile(Residual(), folder / f"{norm}.onnx", IMAGES, **options)


def test_the_file_normalizes_few_channels_and_nothing_is_left_of_weight_and_bias(
    folder: Path, norm: str, report: Report
) -> None:
    proto = onnx.load(folder / f"{norm}.onnx")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    convs = [constants[node.input[1]].shape for node in proto.graph.node if node.op_type == "Conv"]
    assert convs == [(16, 3, 1, 1), (48, 16, 1, 1), (3, 48, 1, 1)]
    scaled = [n for n in proto.graph.node if n.op_type in ("Mul", "Add") and {*n.input} & constants.keys()]
    assert all(constants[name].size == 1 for n in scaled for name in n.input if name in constants)  # epsilon
    assert len(scaled) == (0 if norm == "layer" else 1)
    assert "Mul" not in report.operators_after or norm == "rms"
    assert report.max_error is not None
    assert report.max_error < 1e-5
    assert {check.sizes for check in report.checks} >= {""}


def test_the_report_says_where(norm: str, report: Report) -> None:
    (site,) = report.sites
    assert site.narrow == "16 of 48 channels"
    assert "normalizes" in str(report)
    assert "16 of 48 channels" in str(report)
    assert [note.site for note in report.notes if note.code == "PN219"] == ["bn"]
    assert [run.rewritten for run in report.passes if run.name == "NormalizeBeforeExpansion"] == [1]
    assert "narrow" in report.seconds


@pytest.mark.parametrize("folds", [False, True])
def test_the_network_that_is_exported_stays_as_it_is(tmp_path: Path, folds: bool) -> None:
    model = pn_compiler.transform(Residual(), IMAGES, norm="layer").eval()
    model = pn_compiler.fold(model) if folds else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(IMAGES)
    report = pn_compiler.export_onnx(model, tmp_path / "m.onnx", IMAGES)
    assert [str(note) for note in report.notes] == ["PN219 bn: 16 of 48 channels"]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(IMAGES), expected)
    assert all(site.narrow == "" for site in pn_compiler.sites(model))


class Branching(nn.Module):
    """Its forward cannot be traced; the part that it calls is traced on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.shape[2] > 0 and float(x.sum()) < math.inf else x


def test_regions_of_a_network_that_is_not_traced_as_a_whole() -> None:
    folded = pn_compiler.fold(pn_compiler.transform(Branching(), IMAGES))
    expected = folded(IMAGES)
    notes = narrowing.narrow(folded, Inputs((IMAGES,)), "portable")
    assert [(note.code, note.site) for note in notes] == [("PN219", "block.bn")]
    assert [site.narrow for site in pn_compiler.sites(folded)] == ["16 of 48 channels"]
    assert_same_outputs(folded(IMAGES), expected)


def test_a_site_that_does_not_pay_has_a_note_and_stays() -> None:
    folded = pn_compiler.fold(pn_compiler.transform(Residual(16, 40), norm="layer"))
    before = folded.code
    x = torch.randn(1, 16, 8, 8)
    (note,) = narrowing.narrow(folded, Inputs((x,)), "portable")
    assert (note.code, note.site) == ("PN126", "bn")
    assert "microseconds" in note.message
    assert folded.code == before


def test_inputs_that_do_not_run_move_nothing() -> None:
    folded = pn_compiler.fold(pn_compiler.transform(Residual()))
    assert narrowing.narrow(folded, Inputs((IMAGES[:, :2],)), "portable") == ()


def test_no_target_of_openvino_is_changed() -> None:
    folded = pn_compiler.fold(pn_compiler.transform(Residual()))
    assert narrowing.narrow(folded, Inputs((IMAGES,)), "openvino") == ()


@pytest.mark.parametrize(("target", "narrow"), [("portable", "32 of 96"), ("ort-cpu", "32 of 1280")])
def test_mobilenet_v2_of_torchvision(tmp_path: Path, target: Any, narrow: str) -> None:
    """Its head, and its first blocks, 16 -> 96 and 24 -> 144, which do not pay in the blocked layout."""
    setting = [[1, 16, 1, 1], [6, 24, 2, 2]]
    torch.manual_seed(0)
    net = zoo.torchvision().models.MobileNetV2(num_classes=4, inverted_residual_setting=setting)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    report = pn_compiler.compile(randomize_batch_norms(net).eval(), tmp_path / "m.onnx", x, target=target)
    found = {site.name: site.narrow for site in report.sites if site.narrow}
    assert f"{narrow} channels" in found.values()
    assert len(found) == (3 if target == "portable" else 1)
    assert report.max_error is not None
    assert report.max_error < 1e-5
    if target == "ort-cpu":
        assert report.blocked


def test_half_precision(tmp_path: Path) -> None:
    options: Any = {"dtype": "float16", "norm": "layer"}
    report = pn_compiler.compile(Residual(), tmp_path / "m.onnx", IMAGES, **options)
    assert [site.narrow for site in report.sites] == ["16 of 48 channels"]
    shapes = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT16
    ]
    assert (48, 16, 1, 1) in {np.shape(values) for values in shapes}


def test_normalizers_without_weight_and_bias_are_what_they_were_with_ones() -> None:
    torch.manual_seed(0)
    x, options = torch.randn(2, 6, 5).double(), {"share": None, "var": torch.rand(2).double(), "shift": None}
    plain = FoldedNorm(2, 6, centered=False, weight=None, bias=None, **options)  # type: ignore[arg-type]
    ones = FoldedNorm(2, 6, centered=False, weight=torch.ones(6), bias=torch.zeros(6), **options)  # type: ignore[arg-type]
    assert not list(plain.parameters())
    assert torch.equal(plain(x), ones.double()(x))
    moments = x[0].mean(1), x[0].var(1)
    assert torch.equal(plain.constant_scale(*moments), ones.constant_scale(*moments))
