"""Versions of a model in its repository: new, replaced, several at once, cut off."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import onnx
import pytest

import pn_compiler
from pn_compiler.base import files
from pn_compiler.base.errors import ExportError
from pn_compiler.repository.golden import Golden
from tests.repository.common import config_of, content


def test_a_new_version_leaves_the_old_one(folder: Path, file: Path) -> None:
    pn_compiler.export_model_repository(file, folder, "net")
    config = folder / "net/config.pbtxt"
    config.write_text(config.read_text().replace("2000", "5000") + 'parameters { key: "mine" }\n')  # tuned
    before = content(folder)
    report = pn_compiler.export_model_repository(file, folder, "net")
    after = content(folder)
    assert Path(report.repository).name == "2"
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {
        "net/model-settings.json", "net/2/model.onnx", "net/2/golden.npz", "net/2/report.json",
    }  # fmt: skip
    assert Golden.load(folder / "net/2/golden.npz").version == 2
    (folder / "net/2/model.onnx").write_bytes(b"")
    report = pn_compiler.export_model_repository(file, folder, "net", force=True, max_batch_size=8)
    assert Path(report.repository).name == "2"
    assert config_of(folder).max_batch_size == 8
    report = pn_compiler.export_model_repository(file, folder, "small", max_batch_size=2)
    calls = Golden.load(folder / "small/1/golden.npz").calls
    assert [len(inputs["input"]) for inputs, _ in calls] == [1]  # no server of it takes the others
    assert content(folder)["net/2/model.onnx"] == before["net/1/model.onnx"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "kserve.yaml",
        "net",
        "ray_app.py",
        "settings.json",
        "small",
    ]


def test_versions_share_an_interface(folder: Path, file: Path, tmp_path: Path) -> None:
    pn_compiler.export_model_repository(file, folder, "net")
    other = onnx.load(file)
    other.graph.input[0].name = "image"
    next(node for node in other.graph.node if "input" in node.input).input[0] = "image"
    onnx.save(other, tmp_path / "other.onnx")
    before = content(folder)
    with pytest.raises(ExportError, match="describes other inputs than this model has: choose another name"):
        pn_compiler.export_model_repository(tmp_path / "other.onnx", folder, "net")
    assert content(folder) == before
    pn_compiler.export_model_repository(tmp_path / "other.onnx", folder, "net", force=True)
    assert config_of(folder).input[0].name == "image"
    assert not (folder / "net/2").exists()


def test_several_at_once_lose_nothing(folder: Path, file: Path) -> None:
    """Each gets a version of its own, or is told that someone else was faster."""
    done: list[str] = []

    def export() -> None:
        try:
            done.append(pn_compiler.export_model_repository(file, folder, "net").repository)
        except ExportError:
            done.append("")

    threads = [threading.Thread(target=export) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = [name for name in done if name]
    assert len(set(written)) == len(written) >= 1
    assert sorted(written) == sorted(str(p) for p in (folder / "net").iterdir() if p.is_dir())
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        pn_compiler.export_model_repository(file, folder, "net")
    before = content(folder)
    rename = os.rename

    def full(source: Any, target: Any) -> None:
        if Path(target).name in ("net", "1") and files.REPLACED not in (
            *Path(source).parts,
            *Path(target).parts,
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(ExportError, match=r"cannot write .*model_repository: No space left on device"):
        pn_compiler.export_model_repository(file, folder, "net", force=existing)
    assert {k: v for k, v in content(folder).items() if "/" in k} == {
        k: v for k, v in before.items() if "/" in k
    }


@pytest.mark.parametrize("end", [KeyboardInterrupt, signal.SIGKILL])
def test_a_replacement_that_is_cut_off_gives_the_old_version_back(folder: Path, file: Path, end: Any) -> None:
    """By Ctrl-C at once, by SIGKILL at the next run."""
    pn_compiler.export_model_repository(file, folder, "net")
    before = content(folder)
    code = """
import os, sys
import pn_compiler
rename = os.rename
def cut_off(source, target):
    rename(source, target)
    if "old" in str(target).split(os.sep):
        if sys.argv[3] == "9":
            os.kill(os.getpid(), 9)
        raise KeyboardInterrupt
os.rename = cut_off
pn_compiler.export_model_repository(sys.argv[1], sys.argv[2], "net", force=True)
"""
    command = [sys.executable, "-c", code, str(file), str(folder), "9" if end == signal.SIGKILL else ""]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=200)
    assert done.returncode != 0
    if end == signal.SIGKILL:
        assert not (folder / "net" / "1").exists()
        files.write_atomically(folder / "other", b"")
        (folder / "other").unlink()
    assert content(folder) == before
