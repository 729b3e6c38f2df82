"""Files that read well in a viewer: nodes named after modules, and what a file says about itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler.export.metadata import weights_digest
from pn_compiler.export.node_names import MESSAGE
from pn_compiler.testing import randomize_batch_norms
from tests import zoo

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.bn(self.conv(x)))


def network() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.SiLU())
    net = nn.Sequential()
    net.add_module("stem", stem)
    net.add_module("stages", nn.Sequential(Block(), Block()))
    net.add_module("head", nn.Conv2d(16, 2, 1))
    return randomize_batch_norms(net).eval()


def compiled(folder: Path, **options: Any) -> onnx.ModelProto:
    pn_compiler.compile(network(), folder / "m.onnx", X, norm="layer", **options)
    return onnx.load(folder / "m.onnx")


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return compiled(tmp_path_factory.mktemp("portable"))


def test_nodes_are_named_after_their_modules(portable: onnx.ModelProto) -> None:
    names = {node.name: node.op_type for node in portable.graph.node}
    assert len(names) == len(portable.graph.node)
    assert names["/stem/0/Conv"] == names["/stages/1/conv/Conv"] == names["/head/Conv"] == "Conv"
    for site in ("stem/1", "stages/0/bn", "stages/1/bn"):
        own = [op for name, op in names.items() if name.startswith(f"/{site}/")]
        assert "InstanceNormalization" in own
    assert all(name.startswith(("/", MESSAGE)) for name in names)
    assert all(name.rpartition("/")[2].partition("_")[0] == op for name, op in names.items())


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those in the bodies of others included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g)


@pytest.mark.parametrize("options", [{"target": "ort-cpu"}, {"target": "openvino"}, {"dtype": "float16"}])
def test_whatever_rewrites_the_graph(tmp_path: Path, options: dict[str, str]) -> None:
    names = [node.name for node in all_nodes(compiled(tmp_path, **options).graph)]
    assert len(set(names)) == len(names)
    assert all(name.startswith(("/", MESSAGE)) for name in names)
    named = [name for name in names if name.startswith(("/stem/", "/stages/", "/head/"))]
    assert len(named) >= 0.7 * len(names)  # with ort-cpu, there is a check, and a loop over images
    assert any(name.startswith("/stages/0/bn/") for name in names)


def test_what_the_file_says_about_itself(portable: onnx.ModelProto) -> None:
    assert portable.producer_name == "pn_compiler"
    assert portable.producer_version
    assert portable.doc_string.startswith("3 of 3 BatchNorms became batch-independent normalizers.")
    said = {entry.key: entry.value for entry in portable.metadata_props}
    assert said.keys() == {
        f"pn_compiler.{key}" for key in ("options", "fidelity", "versions", "weights_sha256")
    }
    options = json.loads(said["pn_compiler.options"])
    assert options["norm"] in ("layer", "rms")
    assert (options["dtype"], options["distill_steps"], options["leaves"]) == ("float32", 0, [])
    assert json.loads(said["pn_compiler.versions"])["torch"] == torch.__version__
    assert "outputs moved by" in said["pn_compiler.fidelity"]
    assert said["pn_compiler.weights_sha256"] == weights_digest(portable)


def test_the_fingerprint_is_of_the_weights() -> None:
    def model(values: list[float], name: str = "w") -> onnx.ModelProto:
        tensor = onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [len(values)], values)
        return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor]))

    assert weights_digest(model([1, 2])) == weights_digest(model([1, 2]))
    assert len({weights_digest(m) for m in (model([1, 2]), model([1, 3]), model([1, 2], "v"))}) == 3


def test_weights_beside_the_file_have_the_same_fingerprint(tmp_path: Path, portable: onnx.ModelProto) -> None:
    beside = compiled(tmp_path, external_data=True)  # onnx.load reads them, too
    stated = [
        {e.key: e.value for e in m.metadata_props}["pn_compiler.weights_sha256"] for m in (beside, portable)
    ]
    assert stated[0] == stated[1] == weights_digest(beside)


def test_the_same_network_gives_the_same_bytes(tmp_path: Path, portable: onnx.ModelProto) -> None:
    assert compiled(tmp_path).SerializeToString() == portable.SerializeToString()
    assert str(tmp_path).encode() not in (tmp_path / "m.onnx").read_bytes()


def test_functions_and_classes_among_the_options_are_named(tmp_path: Path) -> None:
    proto = compiled(tmp_path, leaves=[Block], verify=False)
    said = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(said["pn_compiler.options"])["leaves"] == ["Block"]


def test_a_network_of_torchvision(tmp_path: Path) -> None:
    net = randomize_batch_norms(zoo.small("mobilenet")).eval()
    pn_compiler.compile(net, tmp_path / "m.onnx", X, verify=False)
    names = [node.name for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert len(set(names)) == len(names)
    assert sum(name.startswith(("/features/", "/classifier/")) for name in names) >= len(names) - 4
