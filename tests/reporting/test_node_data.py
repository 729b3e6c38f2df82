"""Data for the nodes of a file, in the format of Model Explorer, and where they land in its graph."""

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import pn_compiler
from pn_compiler import Site, cli
from pn_compiler.export import Report
from pn_compiler.reporting.node_data import NAMES, node_data
from pn_compiler.testing import randomize_batch_norms

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FIELDS = {"name", "results", "gradient", "hideAggregatedStats", "hideInChildrenStatsTable"}


class Block(nn.Module):
    """Two BatchNorms, of which one has no activation, and one that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.last(x)


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(nn.Sequential(nn.Conv2d(3, 4, 3), Block())).eval()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Report:
    path = tmp_path_factory.mktemp("compiled") / "m.onnx"
    return pn_compiler.compile(network(), path, X, allow_batch_dependent=True)


def graph_of(report: Report) -> onnx.GraphProto:
    return onnx.load(report.path).graph


def results(data: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    ((graph, content),) = data[name].items()
    assert graph == "main_graph"
    found: dict[str, dict[str, Any]] = content["results"]
    return found


def test_each_node_of_a_site_has_its_path_code_and_error(compiled: Report) -> None:
    graph = graph_of(compiled)
    data = node_data(graph, compiled.sites)
    assert tuple(data) == NAMES
    paths = {node: found["value"] for node, found in results(data, "sites.json").items()}
    owned = {node.name for node in graph.node if "/bn" in node.name or "/last/" in node.name}
    assert set(paths) == set(results(data, "codes.json")) == owned
    assert set(paths.values()) == {"1.bn1", "1.bn2", "1.last"}
    for node, path in paths.items():
        assert node.startswith(f"/{path.replace('.', '/')}/")
    codes = {path: results(data, "codes.json")[node]["value"] for node, path in paths.items()}
    assert codes == {"1.bn1": "pn", "1.bn2": "norm_only PN201", "1.last": "skipped PN104"}
    errors = {paths[node]: found["value"] for node, found in results(data, "errors.json").items()}
    measured = {site.name: site.error for site in compiled.sites if site.error is not None}
    assert errors == pytest.approx({name: 100 * error for name, error in measured.items()}, rel=5e-3)
    assert set(errors) == {"1.bn1", "1.bn2"}


def test_a_path_that_another_begins_with(compiled: Report) -> None:
    """``bn1`` is no part of ``bn``, and what lies within a site belongs to the innermost."""
    nodes = [onnx.NodeProto(name=name) for name in ("/bn/Add", "/bn1/Add", "/bn/inner/Add", "Add", "")]
    sites = [dataclasses.replace(compiled.sites[0], name=name) for name in ("bn", "bn.inner")]
    data = node_data(onnx.GraphProto(name="main_graph", node=nodes), sites)
    found = {node: result["value"] for node, result in results(data, "sites.json").items()}
    assert found == {"/bn/Add": "bn", "/bn/inner/Add": "bn.inner"}


def test_nodes_of_inner_graphs() -> None:
    """To the viewer, the body of a Scan is a graph of its own, a branch of an If part of that around it."""
    inner = helper.make_graph([helper.make_node("Add", ["a", "b"], ["c"], name="/bn/Add")], "inner", [], [])
    scan = helper.make_node("Scan", ["x"], ["y"], name="/Scan", body=inner, num_scan_inputs=1)
    choice = helper.make_node("If", ["x"], ["z"], name="/bn/If", then_branch=inner)
    data = node_data(helper.make_graph([scan, choice], "main_graph", [], []), [Site("bn", "pn", error=0.5)])
    for content in data.values():
        found = {name: set(graph["results"]) for name, graph in content.items()}
        assert found == {
            "main_graph": {"/bn/If", "/bn/If/then_branch//bn/Add"}, "/Scan/body": {"/bn/Add"},
        }  # fmt: skip


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_errors_that_are_no_numbers(compiled: Report, error: float) -> None:
    sites = [dataclasses.replace(site, error=error) for site in compiled.sites]
    found = results(node_data(graph_of(compiled), sites), "errors.json")
    assert {result["value"] for result in found.values()} == {str(error)}


def test_the_format_is_that_of_model_explorer(compiled: Report) -> None:
    """Fields and types as in its ``node_data_builder``; what it does not know it would show as nothing."""
    for content in node_data(graph_of(compiled), compiled.sites).values():
        for data in content.values():
            assert set(data) <= FIELDS | {"showExpandedSummaryOnGroupNode"}
            assert set(data["hideAggregatedStats"]) <= {"min", "max", "sum", "avg"}
            assert [stop["stop"] for stop in data.get("gradient", [])] in ([], [0, 1])
            for result in data["results"].values():
                assert set(result) <= {"value", "bgColor", "textColor"}
                assert isinstance(result["value"], str | float)


def test_model_explorer_finds_each_node(compiled: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own adapter, where it is installed: ``pip install model-explorer-onnx``."""
    monkeypatch.setattr(sys, "argv", ["model-explorer"])  # which it reads when it is imported
    pytest.importorskip("model_explorer_onnx", reason="needs model-explorer-onnx")
    adapter = importlib.import_module("model_explorer_onnx.main").ONNXAdapter()
    builder = importlib.import_module("model_explorer.node_data_builder")
    graphs = {graph.id: graph for graph in adapter.convert(compiled.path, {})["graphs"]}
    for content in node_data(graph_of(compiled), compiled.sites).values():
        for name, given in content.items():
            assert set(given["results"]) <= {node.id for node in graphs[name].nodes}
            builder.GraphNodeData(**given)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    torch.save(randomize_batch_norms(net), tmp_path / "model.pt")
    return tmp_path


SHAPE = ("--input-shape", "1,3,8,8", "--no-verify")


def test_on_the_command_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["model.pt", "-o", "m.onnx", *SHAPE, "--node-data", "nodes"]
    for _ in range(2):  # into a new folder, and into one that is there
        assert cli.main(options) == cli.DONE
    assert "model-explorer m.onnx --extensions=model_explorer_onnx" in capsys.readouterr().out
    assert sorted(path.name for path in (model / "nodes").iterdir()) == sorted(NAMES)
    content = json.loads((model / "nodes/sites.json").read_text())
    assert {result["value"] for result in content["main_graph"]["results"].values()} == {"1"}
    repository = ["--model-repository", "models", "--name", "net"]
    assert cli.main(["model.pt", *repository, *SHAPE, "--node-data", "nodes"]) == cli.DONE


def test_in_the_blocked_layout_nodes_know_their_module(tmp_path: Path) -> None:
    """onnxruntime has made the file; what it calls after a value has the module of that value."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)]
    net = randomize_batch_norms(nn.Sequential(*layers)).eval()
    path = tmp_path / "m.onnx"
    report = pn_compiler.compile(net, path, torch.randn(2, 3, 8, 8), target="ort-cpu")
    (body,) = [a.g for a in onnx.load(path).graph.node[0].attribute if a.name == "body"]
    found = {
        name: sorted(node.op_type for node in body.node if node.name.startswith(f"/{name}/"))
        for name in "0134"
    }
    statistics = ["Conv", "Conv", "Mul", "Pow", "ReduceSum", "Reshape"]
    assert found["0"] == found["3"] == ["Conv"]
    assert set(statistics) <= set(found["1"])
    assert set(statistics) <= set(found["4"])
    values = node_data(onnx.load(path).graph, report.sites)["sites.json"]
    (owned,) = [graph["results"] for graph in values.values() if graph["results"]]
    assert {result["value"] for result in owned.values()} == {"1", "4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--node-data", "model.pt"), "expected a folder"),
        (("--node-data", "no/nodes"), "there is no folder no"),
        (("--node-data", "old", "--report", "old/codes.json"), "named twice"),
        (("--node-data", "m.onnx"), "named twice"),
    ],
)
def test_folders_that_cannot_be_written(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    (model / "old").mkdir()
    assert cli.main(["model.pt", "-o", "m.onnx", *SHAPE, *arguments]) == cli.FAILED
    assert message in capsys.readouterr().err
    assert not (model / "m.onnx").exists()


@pytest.mark.parametrize("task", [("--dry-run",), ("--diagnose", "data.npy")])
def test_there_must_be_a_file(model: Path, task: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["model.pt", *task, "--node-data", "nodes"])
    assert caught.value.code == cli.USAGE
