"""What the command says: a summary to act on, tables on demand, and what was meant by a wrong argument."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler import Site, SiteTable, cli, terminal
from pn_compiler.base.tables import short_percent
from pn_compiler.export import Report
from pn_compiler.export.operator_names import onnx_names
from pn_compiler.export.summary import Line
from pn_compiler.pipeline.fidelity import Fidelity
from pn_compiler.testing import randomize_batch_norms
from tests.base.test_progress import on_a_terminal

SHAPE = ("--input-shape", "1,3,8,8")


class Residual(nn.Module):
    """A site of each kind: with proxy normalization, without, and left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.bn3, self.conv3 = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.bn3.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.conv3(self.bn3(self.bn2(self.conv2(x))))


class Branchy(nn.Module):
    """torch.onnx cannot export it, and torch.export prints its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return x * 2 if x.mean() > 0 else x


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 2, 3, padding=1)
    )
    torch.save(randomize_batch_norms(net).eval(), tmp_path / "model.pt")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == cli.DONE
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def labels(text: str) -> list[str]:
    return [match for line in text.splitlines() if (match := line[:11].strip())]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Report]:
    """What the command prints with -v and --benchmark, what it reports, and what `compile` does."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 2, 3))
    folder, printed = tmp_path_factory.mktemp("compiled"), io.StringIO()
    path, report = folder / "m.pt", folder / "r.json"
    torch.save(randomize_batch_norms(net).eval(), path)
    flags = ("-o", str(folder / "m.onnx"), "--report", str(report), "--benchmark", "-v", *SHAPE)
    with contextlib.redirect_stdout(printed):
        assert cli.main([str(path), *flags]) == cli.DONE
    again = pn_compiler.compile(net, folder / "n.onnx", torch.randn(1, 3, 8, 8))
    return printed.getvalue(), json.loads(report.read_text()), again


Compiled = tuple[str, dict[str, Any], Report]


def test_the_summary_says_what_a_person_needs(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "model.pt", "-o", "m.onnx", *SHAPE)
    assert labels(text) == [
        "converted", "proxy", "input", "output", "fidelity", "verified", "wrote", "next",
    ]  # fmt: skip
    assert text.splitlines()[0].split(maxsplit=1)[1] == "1 of 1 BatchNorms: 1 RMSNorm with an anchor"
    assert re.search(r"^wrote +m\.onnx \([\d.]+ kB, opset 20", text, re.MULTILINE)


def test_each_site_is_counted_with_its_reason(tmp_path: Path) -> None:
    net = randomize_batch_norms(Residual()).eval()
    report = pn_compiler.compile(net, tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    assert (
        report.summary.splitlines()[0].split(maxsplit=1)[1] == "2 of 3 BatchNorms: 2 RMSNorm with an anchor"
    )
    by_label = {line[:11].strip(): line[12:] for line in report.summary.splitlines()}
    assert by_label["left alone"].startswith("1: PN108 hooks on the BatchNorm")
    assert by_label["left alone"].endswith("bn3")
    assert by_label["proxy"].startswith("proxy normalization at 1 of 2; without it 1: PN201")
    assert by_label["proxy"].endswith("bn2")


def test_many_sites_are_counted_by_reason() -> None:
    reasons = [*["PN201"] * 5, *["PN202"] * 4]
    sites = [Site(f"bn{k}", "norm_only", "rms", 1, code=code) for k, code in enumerate(reasons)]
    report = Report(sites=SiteTable(sites), inputs=[{"name": "x", "shape": ["batch", 3], "dtype": "float"}])
    proxy = next(line for line in report.summary.splitlines() if line.startswith("proxy"))
    assert re.fullmatch(r".*without it 9: PN201 [^():]+ \(5\); PN202 [^():]+ \(4\)", proxy)
    one = dataclasses.replace(report, sites=SiteTable(sites[:5])).summary
    assert re.search(r"without it 5: PN201 [^():]+$", one, re.MULTILINE)
    assert "input       x [batch, 3] float" in one.splitlines()


@pytest.mark.parametrize(
    ("share", "text"),
    [(44.04, "4,404 %"), (0.996, "100 %"), (0.0123, "1.2 %"), (1e-5, "0.001 %"), (math.inf, "inf %")],
)
def test_large_shares_are_no_powers_of_ten(share: float, text: str) -> None:
    assert short_percent(share) == text
    assert text in str(Fidelity("8 samples", True, share, None, None))


def test_the_long_table_only_on_demand(compiled: Compiled) -> None:
    """The summary, which never holds it, is the end of what stands under it."""
    text, _, report = compiled
    for long in (text, str(report)):
        assert long.startswith("site  kind")
        assert "\noperator" in long
        assert labels(long)[-2:] == ["wrote", "next"]
    assert "site  kind" not in report.summary
    assert str(report).endswith(report.summary)


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "model.pt", "--dry-run", "-q") == ""
    assert said(capsys, "model.pt", "-o", "m.onnx", *SHAPE, "--quiet", "--report", "-").startswith("{")
    assert cli.main(["missing.pt", "-o", "m.onnx", "-q"]) == cli.FAILED
    assert "missing.pt" in capsys.readouterr().err


def test_the_benchmark(compiled: Compiled) -> None:
    text, report, _ = compiled
    found = report["benchmark"]
    assert found["milliseconds"].keys() == {"BatchNorm", "converted"}
    assert min(found["milliseconds"].values()) > 0
    assert found["operators"] == {"Clip": 1, "Conv": 2}  # torch.onnx folds BatchNorm
    assert re.search(r"^speed +[\d.]+ times the time", text, re.MULTILINE)
    after = report["operators_after"]
    assert re.search(rf"^Conv +2 +{after['Conv']}$", text, re.MULTILINE)
    assert re.search(rf"^Sqrt +{after['Sqrt']}$", text, re.MULTILINE)


def test_a_benchmark_needs_the_network_with_batch_norm(tmp_path: Path) -> None:
    converted = pn_compiler.transform(torch.load("model.pt", weights_only=False))
    with pytest.raises(pn_compiler.PnCompilerError, match="no network with BatchNorm"):
        pn_compiler.compile(converted, tmp_path / "m.onnx", torch.randn(1, 3, 8, 8), benchmark=True)


def test_a_benchmark_that_fails_is_a_note(tmp_path: Path) -> None:
    """onnxruntime has no bfloat16 convolutions on the CPU."""
    report = pn_compiler.compile(
        torch.load("model.pt", weights_only=False), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8),
        dtype="bfloat16", opset_version=22, benchmark=True,
    )  # fmt: skip
    assert "PN311" in {note.code for note in report.notes}
    assert report.benchmark is None
    assert (tmp_path / "m.onnx").exists()


def test_one_operator_has_one_name() -> None:
    traced = {
        "BatchNorm2d": 2, "Conv2d": 1, "conv2d": 1, "Conv1d": 1, "ReLU": 1, "relu": 1, "relu_": 1, "ReLU6": 1,
        "add": 1, "iadd": 1, "AdaptiveAvgPool2d": 1, "flatten": 1, "Flatten": 1, "Linear": 1, "Dropout": 1,
        "my_own": 1,
    }  # fmt: skip
    assert onnx_names(traced) == {
        "Add": 2, "BatchNormalization": 2, "Clip": 1, "Conv": 3, "Gemm": 1, "ReduceMean": 1, "Relu": 3,
        "Reshape": 2, "my_own": 1,
    }  # fmt: skip


def test_the_next_step_is_never_missing() -> None:
    for report in (Report(path="m.onnx"), Report(path="m.onnx", checks=())):
        assert "next" in labels(report.summary)


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("--norm", "grup"), "group"),
        (("--norm=Layer",), "layer"),
        (("--target", "openvnio"), "openvino"),
        (("--dtype", "float61"), "float16"),
        (("--warm-start", "runing_stats"), "running_stats"),
        (("--nrom", "group"), "--norm"),
        (("--num-group=4x",), None),
        (("--input-shap", "1,3,x"), None),
        (("--benchmrk",), "--benchmark"),
        (("--norm", "qqqqqqq"), None),
    ],
)
def test_a_wrong_argument_is_one_line_with_the_nearest_value(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], nearest: str | None
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["model.pt", "-o", "m.onnx", *arguments])
    assert caught.value.code == cli.USAGE
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 300
    assert (f"(did you mean {nearest}?)" if nearest else "did you mean") in err or nearest is None
    assert nearest is not None or "did you mean" not in err


def test_in_python_too() -> None:
    with pytest.raises(pn_compiler.PnCompilerError, match=r"norm='grup': .*\(did you mean group\?\)"):
        pn_compiler.transform(nn.BatchNorm2d(3), norm="grup")  # type: ignore[arg-type]


def test_a_failing_export_prints_no_graph(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save(Branchy().eval(), "branchy.pt")
    arguments = ("branchy.pt", "-o", "m.onnx", *SHAPE, "--allow", f"{__name__}.Branchy", "--unsafe-pickle")
    assert cli.main(list(arguments)) == cli.FAILED
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pn-compile: error: torch.onnx cannot export the model: ")
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 500
    with pytest.raises(pn_compiler.PnCompilerError, match=r"torch.onnx cannot export"):
        pn_compiler.compile(Branchy().eval(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    assert capfd.readouterr() == ("", "")


def test_a_dry_run_writes_the_report(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    text = said(capsys, "model.pt", "--dry-run", "--report", "r.json", *SHAPE)
    assert text.splitlines()[1].split()[:5] == ["1", "pn", "rms,", "anchor", "0.875"]
    report = json.loads(Path("r.json").read_text())
    assert [site["kind"] for site in report["sites"]] == ["pn"]
    assert report["fidelity"]["relative_l2"] > 0
    assert report["path"] == ""
    assert sorted(path.name for path in folder.iterdir()) == ["model.pt", "r.json"]
    assert "wrote" not in labels(text)


def test_two_reports(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "model.pt", "--dry-run", "--report", "a.json", "--report", "-")
    assert Path("a.json").read_text() == text


RUN = "import sys; from pn_compiler import cli; sys.exit(cli.main(sys.argv[1:]))"


def test_colours_and_progress_on_a_terminal(folder: Path) -> None:
    shown = on_a_terminal(f"import sys; sys.argv = {['x', 'model.pt', '--dry-run', *SHAPE]!r}; {RUN}")
    assert "\x1b[32m" in shown  # green: converted
    assert "load" in shown  # a stage, beside the bar
    assert "1 of 1 BatchNorms" in shown


def test_no_colours_where_they_are_not_wanted() -> None:
    code = "from pn_compiler import terminal as t; t.write_error('no'); print(t.table(('a',), [('b',)]))"
    assert "\x1b[1;31m" in on_a_terminal(code)
    for setting in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        shown = on_a_terminal(code, **setting)
        assert "no\r\n" in shown
        assert "31m" not in shown


def test_neither_in_a_pipe(folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "FORCE_COLOR": "1"}
    command = [sys.executable, "-c", RUN, "model.pt", "--dry-run"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "\x1b" not in done.stdout


def test_names_of_modules_do_not_steer_the_terminal() -> None:
    row = ("a\x1b[31m", "[bold]b[/bold]\x07")
    for text in (terminal.table(("x", "y"), [row]), terminal.lines([Line(*row)])):
        assert "\x1b" not in text
        assert r"a\x1b[31m" in text
        assert r"[bold]b[/bold]\x07" in text
