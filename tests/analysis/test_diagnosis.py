"""A diagnosis as a table, as JSON and as a plot."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pn_compiler
from pn_compiler import Diagnosis, SitePower
from pn_compiler.base.errors import ConfigError, ExportError


@pytest.fixture(scope="module")
def some() -> Diagnosis:
    net = nn.Sequential(nn.GroupNorm(1, 6), nn.Flatten(2), nn.GroupNorm(6, 6)).double()
    return pn_compiler.diagnose(
        net, torch.randn(7, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )


def test_table_and_json(some: Diagnosis) -> None:
    lines = str(some).splitlines()
    assert lines[0].replace(" %", "%").split() == [
        "site",
        "kind",
        "channels",
        "power",
        "P1%",
        "P2%",
        "P3%",
        "P4%",
    ]
    assert [line.split()[:3] for line in lines[1:3]] == [["0", "LN", "6"], ["2", "IN", "6"]]
    content = json.loads(some.to_json())
    assert [s["shares"] for s in content["sites"]] == [list(s.shares) for s in some.sites]
    assert content["sites"][0]["p3"] == some.sites[0].p3
    assert (content["collapsed"], content["uniform"]) == ([], ["2"])


@pytest.mark.parametrize("ending", ["png", "PDF", "svg"])
def test_plot(some: Diagnosis, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"power.{ending}"
    some.plot(path)
    magic = {"png": b"\x89PNG", "PDF": b"%PDF", "svg": b"<?xml"}[ending]
    assert path.read_bytes().startswith(magic)
    assert "matplotlib.pyplot" not in sys.modules
    if ending == "svg":  # text is drawn as outlines, named in comments
        drawn = path.read_text()
        assert "P1 constant per channel" in drawn
        assert "depth (normalized layers)" in drawn


def test_plot_draws_the_shares(some: Diagnosis, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    collapsed = SitePower("a", "LN", 4, 8, p1=1, p2=0, p3=0, p4=0)
    flat = SitePower("b", "IN", 4, 8, p1=0, p2=0, p3=1, p4=0)
    Diagnosis((collapsed, flat)).plot(tmp_path / "p.png")
    pixels = np.asarray(image.open(tmp_path / "p.png").convert("RGB"))
    height, width, _ = pixels.shape
    left, right = pixels[height * 6 // 10, [width // 3, width * 3 // 4]]
    assert (left.tolist(), right.tolist()) == ([31, 119, 180], [44, 160, 44])  # colours of P1 and P3


def test_plot_errors(some: Diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="expected an ending out of"):
        some.plot(tmp_path / "power.xyz")
    with pytest.raises(ExportError, match="there is no folder"):
        some.plot(tmp_path / "nowhere" / "power.png")
    with pytest.raises(ConfigError, match="no site"):
        Diagnosis(()).plot(tmp_path / "power.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        some.plot(tmp_path / "power.png")
    assert not list(tmp_path.iterdir())
