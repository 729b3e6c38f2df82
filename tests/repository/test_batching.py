"""Whether a server may put several requests into one batch."""

import json
from pathlib import Path

import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import VerificationError
from tests.repository.common import IMAGES, config_of, network, onnx_file


def test_a_fixed_batch_is_not_batched(folder: Path) -> None:
    """Complaint 1: a fixed batch in the file, and batching in the configuration."""
    report = pn_compiler.export_model_repository(network(), folder, "net", IMAGES, dynamic_batch=False)
    config = config_of(folder)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert [*config.input[0].dims] == [2, 3, 8, 8]
    assert "max_batch_size" not in json.loads((folder / "net/model-settings.json").read_text())
    assert "no batching by the server: the first axes are not one dynamic batch" in report.batching


def test_an_output_that_does_not_follow_the_batch(folder: Path, tmp_path: Path) -> None:
    """Complaint 3: a batch baked into the graph, or mixed; neither is ever batched across requests."""
    flatten = onnx_file(
        tmp_path / "rows.onnx",
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        ["rows", 4],
        shape=[-1, 4],
    )
    pn_compiler.export_model_repository(flatten, folder, "rows")
    assert config_of(folder, "rows").max_batch_size == 0
    baked = onnx_file(
        tmp_path / "baked.onnx",
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        ["batch", 4],
        shape=[2, -1],
    )
    pn_compiler.export_model_repository(baked, folder, "baked")
    assert config_of(folder, "baked").max_batch_size == 0
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    mixed = onnx_file(tmp_path / "mixed.onnx", nodes, ["batch", 2, 2], axes=[0])
    report = pn_compiler.export_model_repository(mixed, folder, "mixed")
    assert config_of(folder, "mixed").max_batch_size == 0
    assert (
        report.batching
        == "no batching by the server: the answer to a sample depends on the others of its batch"
    )


class Adds(nn.Module):
    """[N, 4] inputs, of which exactly two fit."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.ones(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows


def test_a_specialised_batch_is_an_error(folder: Path) -> None:
    """Complaint 4: torch.export fixes the batch, or ignores that it is dynamic."""
    with pytest.raises(VerificationError, match=r"the PyTorch model fails at batch 3: .* try a static batch"):
        pn_compiler.export_model_repository(Adds(), folder, "net", torch.randn(2, 4))
    assert not folder.exists()
