"""Where output goes, and what is left when the command is stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pn_compiler import cli
from pn_compiler.base import files
from pn_compiler.base.errors import ExportError
from tests import killed
from tests.security.files import large_network, network, saved
from tests.security.sandbox import ROOT

SHAPE = ("--input-shape", "1,3,8,8")
COMMAND = (sys.executable, "-m", "pn_compiler.cli")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(saved(network()))
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == cli.FAILED
    err = capsys.readouterr().err
    assert err.startswith("pn-compile: error: ")
    assert err.count("\n") == 1
    return err


def test_links_are_followed_and_kept(folder: Path) -> None:
    (folder / "store").mkdir()
    (folder / "m.onnx").symlink_to("store/real.onnx")
    (folder / "r.json").symlink_to("store/real.json")
    assert cli.main(["model.pt", "-o", "m.onnx", "--report", "r.json", *SHAPE]) == cli.DONE
    assert (folder / "m.onnx").is_symlink()
    assert (folder / "r.json").is_symlink()
    assert names(folder / "store") == ["real.json", "real.onnx"]
    torch.save(large_network(), folder / "model.pt")
    assert cli.main(["model.pt", "-o", "m.onnx", "--external-data", *SHAPE]) == cli.DONE
    assert names(folder / "store") == ["real.json", "real.onnx", "real.onnx.data"]
    assert names(folder) == ["m.onnx", "model.pt", "r.json", "store"]


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:  # whose path may not be long
        server.bind(path.name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "device, pipe or socket"),
        (_socket, "device, pipe or socket"),
        (lambda path: path.symlink_to("/dev/full"), "device, pipe or socket"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.symlink_to("no/where"), "there is no folder"),
        (Path.mkdir, "it is a folder"),
    ],
)
@pytest.mark.parametrize("option", ["-o", "--report"])
def test_only_files_are_replaced(
    folder: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Any], message: str, option: str
) -> None:
    make(folder / "out")
    before = (folder / "out").lstat()
    others = () if option == "-o" else ("-o", "m.onnx")
    assert message in refused(capsys, "model.pt", option, "out", *others, *SHAPE)
    assert (folder / "out").lstat().st_ino == before.st_ino
    assert names(folder) == ["model.pt", "out"]


def test_a_link_in_place_of_the_weights_is_not_replaced(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "precious").write_text("mine")
    (folder / "m.onnx.data").symlink_to("precious")
    assert "it is a link" in refused(capsys, "model.pt", "-o", "m.onnx", "--external-data", *SHAPE)
    assert (folder / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "n" * 300), "File name too long"),
        (("-o", "hard.pt"), "named twice"),
        (("-o", "link.pt"), "named twice"),
        (("-o", "m.onnx", "--external-data", "--report", "m.onnx.data"), "named twice"),
        (("--model-repository", "loop", "--name", "net"), "symbolic links"),
    ],
)
def test_names(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], message: str
) -> None:
    os.link("model.pt", "hard.pt")
    Path("link.pt").symlink_to("model.pt")
    Path("loop").symlink_to("loop")
    before = (folder / "model.pt").read_bytes()
    assert message in refused(capsys, "model.pt", *arguments, *SHAPE)
    assert (folder / "model.pt").read_bytes() == before


NOT_UNICODE = os.fsdecode(b"\xff")


@pytest.mark.parametrize("name", [NOT_UNICODE, "a b/\u65e5\u672c \xe9.onnx", "a\nb", "./a b/../m.onnx"])
def test_names_of_every_kind(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    Path("a b").mkdir()
    report = f"{name}.json"
    assert cli.main(["model.pt", "-o", name, "--report", report, *SHAPE]) == cli.DONE
    assert Path(name).exists()
    assert json.loads(Path(report).read_text())["path"] == str(Path(name))
    out, err = capsys.readouterr()
    assert "verified    largest error" in out
    assert err == ""


@pytest.mark.parametrize(
    "arguments",
    [("-o", NOT_UNICODE, "--external-data"), ("--model-repository", NOT_UNICODE, "--name", "net")],
)
def test_names_that_onnx_does_not_take(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str]
) -> None:
    assert "not Unicode" in refused(capsys, "model.pt", *arguments, *SHAPE)
    assert names(folder) == ["model.pt"]


def test_a_model_repository_with_a_name_that_is_too_long(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = ("--model-repository", "n" * 300, "--name", "net")
    assert "File name too long" in refused(capsys, "model.pt", *repository, *SHAPE)


def test_shapes_larger_than_memory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size in ("9" * 30, str(2**40)):
        assert "input shape" in refused(capsys, "model.pt", "-o", "m.onnx", "--input-shape", f"{size},3,8,8")


def test_a_long_name_that_fits(folder: Path) -> None:
    files.write_atomically(folder / ("n" * 250), b"whole")
    assert (folder / ("n" * 250)).read_bytes() == b"whole"


def test_a_limit_of_file_size_leaves_nothing(folder: Path) -> None:
    limit = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
    limit += "from pn_compiler import cli; sys.exit(cli.main())"
    command = [sys.executable, "-c", limit, "model.pt", "-o", "m.onnx", *SHAPE]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (cli.FAILED, 1), done.stderr
    assert "File too large" in done.stderr
    assert names(folder) == ["model.pt"]


# Temporary files


def _abandon(folder: Path) -> None:
    """Leaves a temporary folder behind, as SIGKILL does."""

    def write() -> None:
        with files.staging_folder(folder / "m.onnx") as stage:
            (stage / "m.onnx.data").write_text("half")
            killed.kill_this_process()

    assert killed.exit_code(write) == -signal.SIGKILL
    assert any(name.startswith(".") for name in names(folder))


def test_what_a_killed_run_leaves_goes_at_the_next(folder: Path) -> None:
    _abandon(folder)
    files.write_atomically(folder / "other", b"whole")
    assert names(folder) == ["model.pt", "other"]


def test_what_a_live_run_uses_stays(folder: Path) -> None:
    with files.staging_folder(folder / "m.onnx") as stage:
        (stage / "m.onnx").write_text("half")
        files.write_atomically(folder / "other", b"whole")
        assert (stage / "m.onnx").read_text() == "half"
    assert names(folder) == ["model.pt", "other"]


def test_what_others_called_alike_stays(folder: Path) -> None:
    (folder / ".pn-compile-precious.tmp").write_text("a file")
    (folder / ".pn-compile-link.tmp").symlink_to(folder)
    files.write_atomically(folder / "other", b"whole")
    assert names(folder) == [".pn-compile-link.tmp", ".pn-compile-precious.tmp", "model.pt", "other"]


@pytest.mark.parametrize("moves", range(5))
def test_a_pair_that_was_cut_off_is_old_or_new_after_the_next_run(folder: Path, moves: int) -> None:
    for name in ("m.onnx", "m.onnx.data"):
        (folder / name).write_text("old")
    code = killed.exit_code(killed.publish, folder / "m.onnx", moves)
    assert code == (0 if moves == 4 else -signal.SIGKILL)
    files.write_atomically(folder / "other", b"whole")
    assert names(folder) == ["m.onnx", "m.onnx.data", "model.pt", "other"]
    found = {(folder / name).read_text() for name in ("m.onnx", "m.onnx.data")}
    assert found == ({"new"} if moves == 4 else {"old"})


def test_publishing_over_a_link_is_refused(folder: Path) -> None:
    (folder / "m.onnx.data").symlink_to("model.pt")
    with files.staging_folder(folder / "m.onnx") as stage:
        (stage / "m.onnx.data").write_text("new")
        with pytest.raises(ExportError, match="it is a link"):
            files.publish([stage / "m.onnx.data"], folder)


# Processes


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux has it")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("library", ["libtorch", "onnxruntime"])
def test_a_signal_while_libraries_load_is_one_line(
    folder: Path, number: signal.Signals, library: str
) -> None:
    command = [*COMMAND, "model.pt", "-o", "m.onnx", "--external-data", *SHAPE]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and library not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert err.startswith("pn-compile: error: interrupted")
    assert err.count("\n") == 1
    assert names(folder) == ["model.pt"]


@pytest.mark.parametrize("arguments", [("--help",), ("model.pt", "--dry-run", *SHAPE)])
def test_a_pipe_that_nobody_reads(folder: Path, arguments: Sequence[str]) -> None:
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait() == cli.DONE
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_standard_output() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "--list-passes"],
            env=ENVIRONMENT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == cli.FAILED
    assert done.stderr == "pn-compile: error: cannot print the result: No space left on device\n"


def test_an_input_without_a_writer_does_not_block(folder: Path) -> None:
    os.mkfifo(folder / "fifo.pt")
    command = [*COMMAND, "fifo.pt", "-o", "m.onnx"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (cli.FAILED, 1)
    assert "not a regular file" in done.stderr


def test_names_from_a_file_do_not_steer_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = network()
    net._modules["\x1b[2J\u202e"] = nn.ReLU()
    torch.save(net, folder / "bad.pt")
    assert "\x1b" not in refused(capsys, "bad.pt", "-o", "m.onnx")
