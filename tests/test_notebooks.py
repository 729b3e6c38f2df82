"""The notebooks run from top to bottom, and what they say of their results holds."""

import ast
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
NAMES = ("convert_and_deploy", "small_batches", "differential_privacy")

pytestmark = pytest.mark.filterwarnings("default")  # as users run them


def cells(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return found


def results(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """The names that the notebook defines, after its cells ran in their order in an empty folder."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    state = torch.get_rng_state()
    for position, cell in enumerate(cells(name)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {position}", "exec"), names)
    torch.set_rng_state(state)
    return names


def test_convert_and_deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = results("convert_and_deploy", tmp_path, monkeypatch)
    assert found["before"] > 94
    assert math.isclose(found["after"], found["before"], abs_tol=1.0)  # "nearly as good before any training"
    assert math.isclose(found["deployed"], found["after"], abs_tol=0.2)
    assert found["effects"][0] > 0.1
    assert found["effects"][1] < 1e-5
    assert (tmp_path / "digits.onnx").exists()
    assert (tmp_path / "model_repository" / "digits" / "1" / "golden.npz").exists()


def test_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = results("small_batches", tmp_path, monkeypatch)
    assert found["results"]["converted"] > found["results"]["BatchNorm"] > 50
    assert found["single"] > 88
    assert (tmp_path / "tuned.onnx").exists()


def test_differential_privacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opacus", reason="the extra `private` is not installed")
    found = results("differential_privacy", tmp_path, monkeypatch)
    assert found["start"] > 92
    assert found["end"] > found["start"] - 1
    assert 2.5 < found["spent"] <= found["EPSILON"] + 0.01
    assert (tmp_path / "private.onnx").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_readable_and_stripped(name: str) -> None:
    kinds = [cell["cell_type"] for cell in cells(name)]
    for before, kind, cell in zip(["", *kinds], kinds, cells(name), strict=False):
        text = "".join(cell["source"])
        if kind == "markdown":
            assert text.strip()
            continue
        assert before == "markdown", text  # a sentence before each
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        assert len(text.splitlines()) <= 32
        ast.parse(text)  # no magic: it runs everywhere


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
