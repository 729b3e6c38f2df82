"""The power plot: names on its axis, a title, and shares that are small but seen."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pn_compiler import Diagnosis, SitePower, cli
from pn_compiler.analysis.power_plot import visible
from pn_compiler.testing import randomize_batch_norms

pytest.importorskip("matplotlib")


def test_names_and_a_title(tmp_path: Path) -> None:
    sites = [SitePower(f"layer{n}.bn$x", "LN", 4, 8, p1=1, p2=0.001, p3=2, p4=0.5) for n in range(30)]
    path = tmp_path / "p.svg"
    Diagnosis(tuple(sites)).plot(path, title="A <title>")
    drawn = path.read_text()
    for text in ("A &lt;title>", "layer0.bn$x", "layer29.bn$x", "shares below 2 % are drawn 2 % high"):
        assert text in drawn.replace("&gt;", ">")


def test_slivers_are_seen(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    Diagnosis((SitePower("a", "LN", 4, 8, p1=1, p2=1e-6, p3=1, p4=1e-6),)).plot(tmp_path / "p.png")
    pixels = np.asarray(image.open(tmp_path / "p.png").convert("RGB"))
    column = pixels[:, pixels.shape[1] * 3 // 5]
    for colour in ([255, 127, 14], [214, 39, 40]):  # of P2 and P4
        assert (column == colour).all(1).sum() >= 3


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.25, 0.25, 0.25, 0.25), (0.25, 0.25, 0.25, 0.25)),
        ((1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0)),
        ((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
        ((0.999, 0.001, 0.0, 0.0), (0.98, 0.02, 0.0, 0.0)),
    ],
)
def test_heights(shares: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert visible(shares) == pytest.approx(expected)
    assert sum(visible(shares)) == pytest.approx(sum(shares))


def test_the_command_draws_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    torch.save(randomize_batch_norms(net).eval(), "model.pt")
    np.save("data.npy", np.random.default_rng(0).normal(size=(4, 3, 8, 8)))
    assert cli.main(["model.pt", "--diagnose", "data.npy", "--plot", "p.svg"]) == cli.DONE
    drawn = Path("p.svg").read_text()
    assert "by depth, as given" in drawn
    assert "by depth, converted" in drawn
    assert cli.main(["model.pt", "--diagnose", "data.npy", "--plot", "p.xyz"]) == cli.FAILED
    assert "expected an ending out of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["model.pt", "--dry-run", "--plot", "p.svg"])
    assert "--diagnose" in capsys.readouterr().err
