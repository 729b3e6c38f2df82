"""The command as a user types it."""

import importlib.metadata
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import pn_compiler
from pn_compiler import Diagnosis, FreezeReport, FrozenSite, SitePower, cli
from pn_compiler.export import Report
from pn_compiler.pipeline import conversion
from pn_compiler.pipeline.fidelity import Fidelity, measure
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests import zoo
from tests.test_anchors import by_hand


class Mine(nn.Module):
    """[N, C, L] inputs, whose shape nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.Conv2d(4, 2, 3, padding=1),
    )
    torch.save(randomize_batch_norms(net), tmp_path / "model.pt")
    return tmp_path


def test_as_written_with_no_other_flag(folder: Path) -> None:
    command = Path(sys.executable).with_name("pn-compile")
    done = subprocess.run(
        [command, "model.pt", "-o", "model.onnx"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""  # quiet in a pipe
    assert "input shape guessed: 3 channels of the first layer, 224 pixels" in done.stdout
    assert "verified    largest error" in done.stdout
    assert (folder / "model.onnx").exists()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


SHAPE = ("--input-shape", "1,3,8,8")
METRIC = ("model.pt", "-o", "m.onnx", "--static-statistics", "--calibrate", "gray.npy", "--metric")


def test_report_and_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, _ = run(
        capsys, "model.pt", "-o", "m.onnx", *SHAPE, "--report", "r.json", "--norm", "group",
        "--num-groups", "2", "--no-proxy", "--warm-start", "running_stats", "--opset", "18",
        "--static-batch", "--no-verify", "--proxy-padding", "output",
    )  # fmt: skip
    assert status == cli.DONE
    report = json.loads((folder / "r.json").read_text())
    assert [s["num_groups"] for s in report["sites"]] == [2]
    assert [s["code"] for s in report["sites"]] == ["PN203"]
    assert (report["opset_version"], report["inputs"][0]["shape"], report["checks"]) == (18, [1, 3, 8, 8], [])


def test_the_report_alone_on_the_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "model.pt", "-o", "m.onnx", *SHAPE, "--report", "-")
    assert (status, err) == (cli.DONE, "")
    assert json.loads(out)["path"] == "m.onnx"
    np.save(folder / "data.npy", np.zeros((4, 3, 8, 8)))
    status, out, _ = run(capsys, "model.pt", "--diagnose", "data.npy", "--report", "-")
    assert status == cli.DONE
    assert json.loads(out).keys() == {"as given", "converted"}
    assert not (folder / "-").exists()


def test_reports_are_json_of_the_standard() -> None:
    """Which knows neither nan nor infinity, as a diverging network has them."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    fidelity = Fidelity("x", True, math.inf, math.nan, 1.0, sites={"1": -math.inf})
    reports = [
        Report(tolerance=math.nan, tuning={"portable": math.inf}, fidelity=fidelity),
        Diagnosis((SitePower("1", "BN", 4, 1.0, math.nan, 0.0, 0.0, 0.0),)),
        FreezeReport((FrozenSite("1", True, math.inf),), None, math.nan, None, 1, 1, "samples"),
    ]
    for report in reports:
        assert "null" in report.to_json()
        json.loads(report.to_json(), parse_constant=refuse)


def test_a_model_repository(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serving = (
        "--model-repository",
        "models",
        "--name",
        "net",
        "--input-names",
        "image",
        "--output-names",
        "maps",
    )
    status, out, _ = run(
        capsys, "model.pt", *SHAPE, *serving, "--target-ort", "1.18", "--max-batch-size", "4"
    )
    assert status == cli.DONE
    assert "\nrepository  models/net/1 (batches of 4 at most)\n" in out
    assert "wrote       models/net/1/model.onnx" in out
    status, out, _ = run(capsys, "model.pt", *SHAPE, *serving, "-o", "m.onnx", "--report", "r.json")
    assert status == cli.DONE
    assert (folder / "m.onnx").read_bytes() == (folder / "models/net/2/model.onnx").read_bytes()
    report = json.loads((folder / "r.json").read_text())
    assert (report["path"], report["repository"]) == ("m.onnx", "models/net/2")
    assert [v["name"] for v in (*report["inputs"], *report["outputs"])] == ["image", "maps"]
    status, _, _ = run(capsys, "model.pt", *SHAPE, *serving, "--force")
    assert status == cli.DONE
    assert sorted(p.name for p in (folder / "models" / "net").iterdir() if p.is_dir()) == ["1", "2"]


def test_dry_run_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "model.pt", "--dry-run")
    assert status == cli.DONE
    assert out.splitlines()[1].split()[:5] == ["1", "pn", "rms,", "anchor", "0.875"]
    assert [p.name for p in folder.iterdir()] == ["model.pt"]


def test_dry_run_measures_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def counted(*args: Any, **options: Any) -> Fidelity:
        found.append(measure(*args, **options))
        return found[-1]

    monkeypatch.setattr(conversion, "measure", counted)
    status, _, _ = run(capsys, "model.pt", *SHAPE, "--dry-run", "--report", "r.json")
    assert status == cli.DONE
    assert [f.relative_l2 for f in found] == [
        json.loads(Path("r.json").read_text())["fidelity"]["relative_l2"]
    ]


def test_diagnose_before_and_after_conversion(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(folder / "data.npy", np.random.default_rng(0).normal(size=(40, 3, 8, 8)))
    status, out, err = run(
        capsys, "model.pt", "--diagnose", "data.npy", "--report", "r.json", "--num-groups", "2"
    )
    assert (status, err) == (cli.DONE, "")
    given, converted = out.split("\n\n")
    assert given.splitlines()[0] == "power of the normalizers' outputs, as given"
    assert given.splitlines()[2].split()[:3] == ["1", "BN", "4"]
    assert converted.splitlines()[2].split()[:3] == ["1", "GN+PN", "4"]
    report = json.loads((folder / "r.json").read_text())
    assert [(name, r["sites"][0]["samples"]) for name, r in report.items()] == [
        ("as given", 40),
        ("converted", 40),
    ]
    x = torch.from_numpy(np.load(folder / "data.npy")).float()
    model = torch.load(folder / "model.pt", weights_only=False).eval()
    with torch.no_grad():
        power = model[1](model[0](x)).square().mean().item()
    assert report["as given"]["sites"][0]["power"] == pytest.approx(power, rel=1e-5)
    assert sorted(p.name for p in folder.iterdir()) == ["data.npy", "model.pt", "r.json"]


def test_diagnose_a_converted_model_and_a_program(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(folder / "data.npz", pixels=np.random.default_rng(0).normal(size=(5, 3, 8, 8)))
    model = torch.load(folder / "model.pt", weights_only=False).eval()
    torch.save(pn_compiler.transform(model), folder / "converted.pt")
    status, out, _ = run(capsys, "converted.pt", "--diagnose", "data.npz", "--unsafe-pickle")
    assert status == cli.DONE
    assert "as given" in out
    assert "converted" not in out
    assert out.splitlines()[2].split()[:3] == ["1", "RMS+PN", "4"]
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 8, 8),)), folder / "fixed.pt2")
    status, out, _ = run(capsys, "fixed.pt2", "--diagnose", "data.npz", "--report", "r.json")
    assert status == cli.DONE
    given, converted = out.split("\n\n")
    assert "no normalizer is called as a module" in given
    assert converted.splitlines()[2].split()[:3] == ["1", "RMS+PN", "4"]
    assert json.loads((folder / "r.json").read_text())["converted"]["sites"][0]["samples"] == 4  # two by two


def test_diagnose_the_same_from_all_kinds_of_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 10, 3), np.uint8)
    (folder / "images").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
    centre = torch.from_numpy(pixels)[:, 2:10, 1:9] / 255
    values = ((centre - 0.5) / torch.tensor([0.1, 0.2, 0.3])).permute(0, 3, 1, 2).contiguous()
    np.save(folder / "data.npy", values.numpy())
    save_file({"x": values}, folder / "data.safetensors")
    (folder / "my_batches.py").write_text(
        "import numpy\ndef batches(): return numpy.array_split(numpy.load('data.npy'), 3)"
    )
    images = ("images", "--crop", "8", "--mean", "0.5", "0.5", "0.5", "--std", "0.1,0.2,0.3")
    found = []
    for data in (("data.npy",), ("data.safetensors",), ("my_batches:batches", "--allow-data-code"), images):
        status, out, err = run(capsys, "model.pt", "--diagnose", *data)
        assert (status, err) == (cli.DONE, "")
        found.append(out)
    assert found[0].startswith("power of the normalizers' outputs, as given")
    assert set(found) == {found[0]}
    status, out, _ = run(capsys, "model.pt", "--diagnose", "images", "--resize", "8,9", "--report", "r.json")
    assert status == cli.DONE
    assert out != found[0]


def test_list_passes_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--list-passes")
    assert status == cli.DONE
    assert "5. ReplaceBatchNorm: Replaces each BatchNorm" in out
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("pn-compile 0.")
    for name in ("torch", "onnx", "onnxruntime"):
        assert f" {name} {importlib.metadata.version(name)}," in out
    done = subprocess.run(
        [sys.executable, "-m", "pn_compiler", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == out


def test_strict_is_status_3(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "model.pt", "-o", "m.onnx", *SHAPE, "--num-groups", "3", "--strict")
    assert (status, out) == (cli.REFUSED, "")
    assert err.startswith("pn-compile: error: PN205 1: 3 groups do not divide 4 channels")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.pt", "-o", "m.onnx"), "cannot read missing.pt: No such file"),
        (("empty.pt", "-o", "m.onnx"), "empty.pt is empty"),
        (("cut.pt", "-o", "m.onnx"), "cut.pt is damaged"),
        (("text.pt", "-o", "m.onnx"), "text.pt is not a model"),
        (("state.pt", "-o", "m.onnx"), "state_dict, parameters without the network"),
        (("model.pt", "-o", "m.onnx", "--input-shape", "1,5,8,8"), "does not run on an input of shape"),
        (("model.pt", "-o", "m.onnx", "--input-shape", "3,8"), "does not run on an input of shape"),
        (("model.pt", "-o", "model.pt", *SHAPE), "is named twice"),
        (("model.pt", "-o", "m.onnx", "--report", "m.onnx", *SHAPE), "is named twice"),
        (("model.pt", "-o", "nowhere/m.onnx"), "cannot write nowhere/m.onnx: there is no folder nowhere"),
        (("model.pt", "-o", "m.onnx", "--report", "nowhere/r.json"), "cannot write nowhere/r.json"),
        (("model.pt", "-o", "m.onnx", "--opset", "9", *SHAPE), "opset 9: expected 18 to 24"),
        (("model.pt", "-o", "m.onnx", "--opset", "23", "--target-ort", "1.18"), "opset 21 at most, not 23"),
        (("model.pt", "--model-repository", "no/where", "--name", "net"), "there is no folder no"),
        (("model.pt", "--model-repository", "models", "--name", "a/b"), "name 'a/b': expected letters"),
        (("model.pt", *SHAPE, "-o", "m.onnx", "--output-names", "a,b"), "2 output names for 1 outputs"),
        (("sequence.pt", "-o", "m.onnx", "--allow", "tests.test_cli.Mine"), "cannot be guessed"),
        (("sequence.pt", "-o", "m.onnx"), "--allow tests.test_cli.Mine"),
        (("model.pt", "-o", "m.onnx", "--norm", "instance", "--num-groups", "2"), "num_groups goes with"),
        (("model.pt", "--diagnose", "missing.npy"), "cannot read missing.npy: No such file"),
        (("model.pt", "--diagnose", "gray.npy"), "does not run on batch 1 ([2, 1, 8, 8] float32): "),
        (("model.pt", "--diagnose", "gray.npy", "--report", "gray.npy"), "is named twice"),
        (("model.pt", "--diagnose", "gray.npy", "--resize", "8"), "not a folder of images, for which"),
        (("model.pt", "--diagnose", "a.b:c"), "only imported and called with --allow-data-code"),
        (("model.pt", "--diagnose", "a.b:c", "--allow-data-code"), "a.b:c: a.b.c cannot be imported"),
        (("model.pt", "--diagnose", "."), "holds no images: expected files .jpg"),
        ((*METRIC, "math:pow"), "gray.npy has no labels, which a metric needs"),
        ((*METRIC[:-2], ".", "--metric", "math:pow"), "holds no images: expected files .jpg"),
        (("model.pt", "--diagnose", "gray.npy", "--report", "nowhere/r.json"), "cannot write nowhere/r.json"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_1(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    (folder / "empty.pt").touch()
    (folder / "cut.pt").write_bytes((folder / "model.pt").read_bytes()[:500])
    (folder / "text.pt").write_text("weights, I promise")
    torch.save(nn.Linear(2, 2).state_dict(), folder / "state.pt")
    torch.save(randomize_batch_norms(Mine()), folder / "sequence.pt")
    np.save(folder / "gray.npy", np.zeros((2, 1, 8, 8)))
    before = {p.name for p in folder.iterdir()}
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (cli.FAILED, "")
    assert message in err
    assert err.startswith("pn-compile: error: ")
    assert err.count("\n") == 1
    assert {p.name for p in folder.iterdir()} == before


METRICS = """
import torch

def right(outputs, labels):
    right = outputs.mean((2, 3)).argmax(1) == labels  # of the two channels
    return 100 * right.double().mean()

def batches():
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    yield from zip(images.split(4), torch.arange(16).split(4))

def broken(outputs, labels):
    raise ValueError("two\\nlines")
"""


def test_a_metric_of_the_user(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "own_measures.py").write_text(METRICS)
    monkeypatch.syspath_prepend(str(folder))
    for number in range(24):
        (folder / "data" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "data" / str(number % 2) / f"{number}.png")
    compiled = ("model.pt", "-o", "m.onnx", *SHAPE, "--report", "r.json", "--error-budget", "1000")
    compiled += ("--static-statistics", "--metric", "own_measures:right", "--calibrate")
    for data in (("data",), ("own_measures:batches", "--allow-data-code")):
        status, _, err = run(capsys, *compiled, *data)
        assert (status, err) == (cli.DONE, "")
        static = json.loads((folder / "r.json").read_text())["static"]
        assert static["metric"] == "own_measures:right"
        assert 0 <= static["metric_before"] <= 100
        assert [site["frozen"] for site in static["sites"]] == [True]
    for name, message in (
        ("own_measures:broken", "the metric own_measures:broken failed: ValueError: two"),
        ("own_measures:absent", "own_measures:absent: own_measures.absent cannot be imported"),
        ("own_measures", "metric='own_measures': expected a function of outputs and labels"),
    ):
        status, _, err = run(capsys, *compiled[:-2], name, "--calibrate", "data")
        assert status == cli.FAILED
        assert err.startswith(f"pn-compile: error: {message}")
        assert err.count("\n") == 1


def test_anchors_for_a_budget(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "own_measures.py").write_text(METRICS)
    monkeypatch.syspath_prepend(str(folder))
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    np.save(folder / "data.npy", images.numpy())
    anchored = ("model.pt", "--norm", "rms", "--anchor", "auto")
    compiled = (*anchored, *SHAPE, "-o", "m.onnx", "--report", "r.json", "--calibrate")
    labelled = ("own_measures:batches", "--allow-data-code", "--metric", "own_measures:right")
    found = []
    for options in (
        ("data.npy", "--anchor-budget", "1000"),
        ("data.npy", "--anchor-budget", "0.01"),
        (*labelled, "--anchor-budget", "1000"),
    ):
        status, _, err = run(capsys, *compiled, *options)
        assert (status, err) == (cli.DONE, "")
        (site,) = json.loads((folder / "r.json").read_text())["sites"]
        assert site["residual"] is None  # weight and bias are those of the running statistics
        found.append(site["anchor"])
    assert found[0] == found[2] == 0 < found[1]
    for more in (("--dry-run", "--calibrate", "data.npy"), ("--diagnose", "data.npy")):
        status, out, err = run(capsys, *anchored, *more)
        assert (status, err) == (cli.DONE, "")
        assert "1" in out


def test_rms_with_an_anchor_from_end_to_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network of torchvision, against BatchNorms that are replaced by hand."""
    torch.manual_seed(0)
    model = randomize_batch_norms(zoo.small("resnet")).eval()
    torch.save(model, folder / "resnet.pt")
    arguments = (
        "resnet.pt",
        "-o",
        "r.onnx",
        "--norm",
        "rms",
        "--anchor",
        "0.5",
        "--input-shape",
        "1,3,64,64",
    )
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (cli.DONE, "")
    assert "verified" in out
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    session = onnxruntime.InferenceSession(folder / "r.onnx")
    (actual,) = session.run(None, {"x": x.float().numpy()})
    with torch.no_grad():
        expected = by_hand(model.double(), {"norm": "rms", "anchor": 0.5})(x)
    assert_same_outputs(torch.from_numpy(np.asarray(actual)), expected)


def test_a_target_in_a_read_only_file_system(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "model.pt", "-o", "/proc/m.onnx", *SHAPE)
    assert status == cli.FAILED
    assert err.startswith("pn-compile: error: cannot write /proc/m.onnx")


@pytest.mark.parametrize(
    "arguments",
    [
        ("model.pt", "-o", "m.onnx", "--threads", "2"),  # nothing is measured
        ("model.pt",),
        ("-o", "m.onnx"),
        ("model.pt", "-o", "m.onnx", "--input-shape", "1,x"),
        ("model.pt", "-o", "m.onnx", "--norm", "batch"),
        ("model.pt", "--model-repository", "models"),
        ("model.pt", "-o", "m.onnx", "--name", "net"),
        ("model.pt", "-o", "m.onnx", "--force"),
        ("model.pt", "--model-repository", "models", "--name", "net", "--diagnose", "data.npy"),
        ("model.pt", "-o", "m.onnx", "--num-groups", "0"),
        ("model.pt", "-o", "m.onnx", "--no-such-flag"),
        ("model.pt", "-o", "m.onnx", "--diagnose", "data.npy"),
        ("model.pt", "--dry-run", "--diagnose", "data.npy"),
        ("model.pt", *SHAPE, "--diagnose", "data.npy"),
        ("model.pt", "-o", "m.onnx", "--mean", "0.5"),
        ("model.pt", "-o", "m.onnx", "--interpolation", "bicubic"),
        ("model.pt", "--diagnose", "data", "--resize", "8", "--interpolation", "lanczos"),
        ("model.pt", "-o", "m.onnx", "--calibrate", "data", "--metric", "a.b:c"),
        ("model.pt", "-o", "m.onnx", "--anchor", "auto"),
        ("model.pt", "-o", "m.onnx", "--anchor", "least"),
        ("model.pt", "-o", "m.onnx", "--anchor", "0.5", "--anchor-budget", "0.1"),
        ("model.pt", "--dry-run", "--allow-data-code"),
        ("model.pt", "--diagnose", "data", "--resize", "1,2,3"),
        ("model.pt", "--diagnose", "data", "--crop", "0"),
        ("model.pt", "--diagnose", "data", "--std", "0.5,x"),
        ("model.pt", "-o", "-"),
        ("model.pt", "-o"),
        ("model.pt", "-o", "m.onnx", "--opset", "9" * 5000),
        ("model.pt", "-o", "m.onnx", "one\nmore"),
    ],
)
def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert caught.value.code == cli.USAGE
    err = capsys.readouterr().err
    assert err.startswith("pn-compile: error: ")
    assert "usage: pn-compile" in err
    assert err.count("\n") == 1


def test_an_exported_program_keeps_its_fixed_batch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    net = randomize_batch_norms(net).eval()
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 8, 8),)), folder / "fixed.pt2")
    status, out, _ = run(capsys, "fixed.pt2", "-o", "m.onnx", "-v")
    assert status == cli.DONE
    assert "fixed to 2, as the program was exported" in out
    assert "1     pn" in out
    status, _, err = run(capsys, "fixed.pt2", "-o", "m.onnx", "--input-shape", "4,3,8,8")
    assert status == cli.FAILED
    assert "exported for a batch of 2, not of 4" in err


def test_verbose_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    status, _, err = run(capsys, "missing.pt", "-o", "m.onnx", "-v")
    assert status == cli.FAILED
    assert "traceback" in caplog.text
    assert "pn-compile: error: cannot read missing.pt" in err
