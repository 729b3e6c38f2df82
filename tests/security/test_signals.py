"""Ctrl-C and SIGTERM at moments that are hard to hit, each made to happen."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pn_compiler import cli
from tests.security.files import network, saved
from tests.security.sandbox import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SHAPE = ("--input-shape", "1,3,8,8")

START = """
import os, signal, sys
from pn_compiler import __main__ as start
"""
WHEN_IMPORTED = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
"""


def run(folder: Path, code: str, *arguments: str) -> tuple[int, str]:
    (folder / "model.pt").write_bytes(saved(network()))
    command = [sys.executable, "-c", f"{START}{code}\nsys.exit(start.main())", *arguments]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["pn_compiler.cli", "argparse", "torch", "onnx", "tqdm"])
def test_while_a_module_is_imported(tmp_path: Path, module: str, number: signal.Signals) -> None:
    code = WHEN_IMPORTED.format(module=module, number=int(number))
    status, err = run(tmp_path, code, "model.pt", "-o", "m.onnx", *SHAPE)
    assert (status, err) == (130, "pn-compile: error: interrupted; nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_an_exception_that_crosses_a_text_that_is_executed(tmp_path: Path) -> None:
    """Python notes it as unhandled, and would end with the signal instead of the status."""
    code = """
import pn_compiler
def compile(*args, **kwargs):
    exec("os.kill(os.getpid(), signal.SIGINT)", globals())
pn_compiler.compile = compile
"""
    status, err = run(tmp_path, code, "model.pt", "-o", "m.onnx", *SHAPE)
    assert (status, err) == (130, "pn-compile: error: interrupted; nothing was written\n")


def test_an_exception_that_a_library_swallows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiled(*_: object) -> tuple[str, str]:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return "report", "{}"

    (tmp_path / "model.pt").write_bytes(saved(network()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_compile", compiled)
    assert cli.main(["model.pt", "-o", "m.onnx"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--version",), ("--list-passes",), ("no.pt", "-o", "m.onnx")])
def test_while_python_ends(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """By then the status is known and the message printed."""
    plain = run(tmp_path, "", *arguments)
    assert plain[0] == ("no.pt" in arguments)
    code = "import atexit; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    assert run(tmp_path, code, *arguments) == plain


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pn_compiler", "--version"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pn-compile ")
