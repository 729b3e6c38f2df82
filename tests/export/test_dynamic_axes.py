"""Files that take any height, width or length, besides any batch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler import cli
from pn_compiler.base.errors import ConfigError, ExportError
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests import zoo


class Skips(nn.Module):
    """Half the size, twice it, joined with what was before: sizes must be even."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 8, 2, 2), nn.BatchNorm2d(8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(torch.cat([y, self.up(self.down(y))], 1))


class Fixed(nn.Module):
    """Flattens all positions into one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4 * 8 * 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Two(nn.Module):
    """An image and a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.sound = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU())

    def forward(self, image: Tensor, sound: Tensor) -> Tensor:
        return self.image(image).mean((2, 3)) + self.sound(sound).mean(2)


def randomized(model: nn.Module) -> nn.Module:
    return randomize_batch_norms(model).eval()


def run(path: Path, **feed: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in feed.items()})[0])


def shapes(path: Path) -> dict[str, Any]:
    return {value.name: value.shape for value in onnxruntime.InferenceSession(str(path)).get_inputs()}


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        ("layer", {}),
        ("rms", {"dynamic_batch": False}),
        ("rms", {"target": "openvino"}),
        ("rms", {"dtype": "float16"}),
    ],
)
def test_height_and_width(tmp_path: Path, norm: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = randomized(Skips()), torch.randn(1, 3, 16, 24)
    anchor = 0.75 if norm == "rms" else 0.0
    report = pn_compiler.compile(
        model, tmp_path / "m.onnx", x, dynamic_axes=["H", "W"], norm=norm, anchor=anchor, **options
    )
    batch = 1 if options.get("dynamic_batch") is False else "batch"
    assert shapes(tmp_path / "m.onnx") == {"x": [batch, 3, "H", "W"]}
    assert {check.sizes for check in report.checks} == {"", "H=48, W=88"}
    assert "and at H=48, W=88" in str(report)
    converted = pn_compiler.transform(model, x, norm=norm, anchor=anchor)
    for size in ((16, 24), (30, 12), (8, 40)):
        other = torch.randn(1, 3, *size)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if "dtype" in options else {}
        torch.testing.assert_close(
            run(tmp_path / "m.onnx", x=other),
            converted(other).detach(),
            **(tolerance or {"rtol": 1e-4, "atol": 1e-4}),
        )


def test_one_axis_and_the_external_weights(tmp_path: Path) -> None:
    model, x = randomized(Skips()), torch.randn(2, 3, 16, 16)
    pn_compiler.compile(model, tmp_path / "m.onnx", x, dynamic_axes=("W",), external_data=True)
    assert shapes(tmp_path / "m.onnx") == {"x": ["batch", 3, 16, "W"]}


def test_names_of_the_users_own(tmp_path: Path) -> None:
    model = randomized(Two())
    image, sound = torch.randn(2, 3, 8, 8), torch.randn(2, 2, 20)
    axes = {"image": {2: "side", -1: "side"}, "sound": {-1: "time"}}
    pn_compiler.compile(model, tmp_path / "m.onnx", (image, sound), dynamic_axes=axes, input_names=["a", "b"])
    assert shapes(tmp_path / "m.onnx") == {"a": ["batch", 3, "side", "side"], "b": ["batch", 2, "time"]}
    image, sound = torch.randn(5, 3, 12, 12), torch.randn(5, 2, 33)
    want = pn_compiler.transform(model)(image, sound)
    assert_same_outputs(run(tmp_path / "m.onnx", a=image, b=sound), want)


def test_a_converted_network(tmp_path: Path) -> None:
    model, x = randomized(Skips()), torch.randn(1, 3, 16, 16)
    converted = pn_compiler.transform(model, x)
    report = pn_compiler.export_onnx(converted, tmp_path / "m.onnx", x, dynamic_axes=("H", "W"))
    assert {check.sizes for check in report.checks} == {"", "H=48, W=80"}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("X",), "none of the letters"), (("D",), "no input has an axis D"), ("HW", "expected letters"),
        ({"y": {2: "h"}}, "no input y: there are x"), ({"x": {4: "h"}}, "no axis 4"),
        ({"x": {0: "h"}}, "no axis 0"), ({"x": {-4: "h"}}, "no axis -4"), (3, "expected letters"),
        ({"x": {2: "batch"}}, "expected letters"), ({"x": {2: "a b"}}, "expected letters"),
        ({"x": ["h"]}, "expected letters"), ({"x": {2: "s", 3: "s"}}, "different sizes"),
    ],
)  # fmt: skip
def test_axes_that_are_none(tmp_path: Path, axes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pn_compiler.compile(
            randomized(Skips()), tmp_path / "m.onnx", torch.randn(1, 3, 16, 24), dynamic_axes=axes
        )
    assert not (tmp_path / "m.onnx").exists()


def test_a_network_of_one_size(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"does not run on other sizes than H=8, W=8.*--dynamic"):
        pn_compiler.compile(
            randomized(Fixed()), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8), dynamic_axes=("H", "W")
        )


PUBLIC = {
    "small resnet": lambda: zoo.small("resnet"),
    "small efficientnet": lambda: zoo.small("efficientnet"),
    "timm": lambda: zoo.timm().create_model("test_efficientnet", num_classes=4),
    "resnet18": lambda: zoo.torchvision().models.resnet18(num_classes=4),
    "mobilenetv3": lambda: zoo.timm().create_model("mobilenetv3_small_050", num_classes=4),
    "regnet": lambda: zoo.timm().create_model("regnety_002", num_classes=4),
}
WHOLE = ("resnet18", "mobilenetv3", "regnet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in WHOLE else name for name in PUBLIC]
)
def test_networks_of_torchvision_and_timm(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = PUBLIC[name]()
    torch.save(randomized(model), "m.pt")
    arguments = ["m.pt", "-o", "m.onnx", "--input-shape", "1,3,64,64", "--dynamic", "H,W"]
    assert cli.main(arguments) == cli.DONE
    assert [shape[2:] for shape in shapes(Path("m.onnx")).values()] == [["H", "W"]]
    x = torch.randn(2, 3, 80, 48)
    want = pn_compiler.transform(model, x)(x).detach().numpy()
    (feed,) = shapes(Path("m.onnx"))
    actual = run(Path("m.onnx"), **{feed: x}).numpy()
    assert np.abs(actual - want).max() <= 1e-4 * np.abs(want).max()
