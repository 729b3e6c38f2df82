"""Networks that have no ONNX file as a whole: they are converted, and a part of them is compiled."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler import cli
from pn_compiler.base.errors import PnCompilerError
from pn_compiler.data.parts import part_hint
from pn_compiler.testing import randomize_batch_norms
from tests import zoo

X = torch.randn(1, 3, 16, 16)


class Detector(nn.Module):
    """A list of images to as many boxes as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1))
        self.heads = nn.ModuleList([nn.Conv2d(5, 1, 1)])

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for scores in self.heads[0](self.backbone(torch.stack(list(images)))):
            boxes = [score for score in scores[0].flatten().tolist() if score > 0]
            found.append({"boxes": torch.tensor(boxes)})
        return found


def detector() -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(Detector()).eval()


def test_it_is_converted_and_says_what_can_be_exported(tmp_path: Path) -> None:
    images = [X[0], X[0]]
    converted = pn_compiler.transform(detector(), (images,))
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    assert len(converted(images)) == 2
    with pytest.raises(
        PnCompilerError, match=r"its part backbone, with 1 of 1 .*--part backbone --input-shape 1,3,"
    ):
        pn_compiler.compile(detector(), tmp_path / "m.onnx", (images,))
    report = pn_compiler.compile(detector().backbone, tmp_path / "m.onnx", X)
    assert report.max_error is not None
    pn_compiler.export_onnx(converted.backbone, tmp_path / "b.onnx", X)  # a part of the converted one


def test_a_part_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(detector().state_dict(), "d.pt")
    common = ["d.pt", "--arch", "tests.data.test_parts:detector", "-o", "m.onnx"]
    assert cli.main(common) == cli.FAILED
    assert "--part backbone --input-shape 1,3,HEIGHT,WIDTH" in capsys.readouterr().err
    part = [*common, "--input-shape", "1,3,16,16", "--part"]
    assert cli.main([*part, "backbone"]) == cli.DONE
    assert "verified    largest error" in capsys.readouterr().out
    assert cli.main([*part, "neck"]) == cli.FAILED
    assert "no part neck: its parts are backbone, heads" in capsys.readouterr().err


def test_the_part_of_torchvisions_detectors() -> None:
    detection = zoo.torchvision().models.detection
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    assert "its part backbone" in part_hint(model)
    assert "--input-shape 1,3," in part_hint(model)


def test_no_part_of_plain_networks() -> None:
    assert part_hint(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())) == ""
    assert part_hint(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))) == ""
