"""Weights in a file of their own: the pair is there whole or not at all."""

import copy
import gc
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import pn_compiler
from pn_compiler.base import files
from pn_compiler.base.errors import ExportError, VerificationError
from pn_compiler.base.stopwatch import Stopwatch
from pn_compiler.export import (
    TARGETS,
    ExportOptions,
    external_data,
    make_session,
    to_onnx,
    verify_onnx,
)
from pn_compiler.export.exporter import export_graph
from pn_compiler.export.verify import Verification
from pn_compiler.running.inputs import Inputs
from pn_compiler.testing import randomize_batch_norms
from tests import killed

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3),
        nn.BatchNorm2d(32), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 40),
    )  # fmt: skip
    return randomize_batch_norms(net).eval()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def outputs(path: Path) -> np.ndarray:
    return make_session(str(path)).run(None, {_input(path): IMAGES.numpy()})[0]


def _input(path: Path) -> str:
    return onnx.load(path, load_external_data=False).graph.input[0].name


def write_pair(folder: Path) -> None:
    with files.staging_folder(folder / "m.onnx") as staged:
        for name in ("m.onnx", "m.onnx.data"):
            (staged / name).write_text("new")
        files.publish([staged / "m.onnx.data", staged / "m.onnx"], folder)


def test_the_pair_computes_what_the_single_file_computes(tmp_path: Path) -> None:
    report = pn_compiler.compile(network(), tmp_path / "m.onnx", IMAGES, external_data=True)
    pn_compiler.compile(network(), tmp_path / "single.onnx", IMAGES)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data", "single.onnx"]
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    outside = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for t in outside for entry in t.external_data if entry.key == "location"} == {
        "m.onnx.data"
    }
    assert report.data_bytes == (tmp_path / "m.onnx.data").stat().st_size > 16 * 32 * 9 * 4
    assert report.file_bytes == (tmp_path / "m.onnx").stat().st_size
    assert "m.onnx.data" in str(report)
    assert {(check.batch, check.optimized) for check in report.checks} == {
        (batch, optimized) for batch in (1, 3) for optimized in (False, True)
    }
    np.testing.assert_array_equal(outputs(tmp_path / "m.onnx"), outputs(tmp_path / "single.onnx"))
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)


def test_a_model_above_the_limit_is_written_as_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_data, "_MAX_BYTES", 10_000)
    pn_compiler.compile(network(), tmp_path / "m.onnx", IMAGES)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]


def test_a_new_pair_takes_the_place_of_the_old(tmp_path: Path) -> None:
    pn_compiler.compile(network(), tmp_path / "m.onnx", IMAGES, external_data=True)
    before = outputs(tmp_path / "m.onnx")
    changed = network()
    with torch.no_grad():
        next(changed.parameters()).mul_(0.5)
    pn_compiler.compile(changed, tmp_path / "m.onnx", IMAGES, external_data=True)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert np.abs(outputs(tmp_path / "m.onnx") - before).max() > 1e-3


@pytest.mark.parametrize("moves", range(4))
def test_a_failing_move_leaves_the_old_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_text("old")
    remaining = iter([True] * moves + [False] + [True] * 10)
    rename = Path.rename

    def sometimes(self: Path, target: Path) -> Path:
        if not next(remaining):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", sometimes)
    with pytest.raises(ExportError, match="No space left"):
        write_pair(tmp_path)
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert {(tmp_path / name).read_text() for name in names(tmp_path)} == {"old"}


@pytest.mark.parametrize("moves", range(5))
def test_a_process_killed_while_moving_leaves_no_mixed_pair(tmp_path: Path, moves: int) -> None:
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_text("old")
    code = killed.exit_code(killed.publish, tmp_path / "m.onnx", moves)
    assert code == (0 if moves == 4 else -signal.SIGKILL)
    if (tmp_path / "m.onnx").exists():  # without it nothing loads
        assert (tmp_path / "m.onnx").read_text() == (tmp_path / "m.onnx.data").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the Linux mount command")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ExportError, match="No space left on device"):
            pn_compiler.compile(network(), disk / "m.onnx", IMAGES, external_data=True)
        assert names(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_weights_are_compared_in_the_file_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte that goes wrong on the way to the disk is found, and nothing is left."""
    move = external_data.move_weights_out

    def damaged(model: object, path: Path) -> None:
        move(model, path)  # type: ignore[arg-type]
        data = path.with_name(f"{path.name}.data")
        content = np.fromfile(data, np.float32)
        content[: len(content) // 2] += 0.1
        content.tofile(data)

    monkeypatch.setattr("pn_compiler.export.exporter.move_weights_out", damaged)
    with pytest.raises(VerificationError, match="differs from PyTorch"):
        pn_compiler.compile(network(), tmp_path / "m.onnx", IMAGES, external_data=True)
    assert names(tmp_path) == []


def test_weights_leave_memory_before_onnxruntime_takes_as_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but those of the caller's model, which is left as it was."""
    net = network()
    before = copy.deepcopy(net.state_dict())
    shape, alive = net[0].weight.shape, []

    def weights() -> int:
        gc.collect()
        found = [x for x in gc.get_objects() if type(x) is nn.Parameter and x.device.type == "cpu"]
        return sum(parameter.shape == shape for parameter in found)

    def verify(*args: Any, **kwargs: Any) -> Any:
        alive.append(weights())
        return verify_onnx(*args, **kwargs)

    monkeypatch.setattr("pn_compiler.export.to_onnx.verify_onnx", verify)
    there = weights()
    pn_compiler.compile(net, tmp_path / "m.onnx", IMAGES, external_data=True)
    assert alive == [there]
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_two_stage_sums_find_weights_that_are_beside_the_file(tmp_path: Path) -> None:
    """300 ones are no inline constant any more."""
    net = nn.Sequential(nn.GroupNorm(300, 600), nn.GELU()).eval()
    example, staged = Inputs((torch.randn(2, 600, 4, 4),)), tmp_path / "m.onnx"
    proto = export_graph(net, example, ExportOptions(external_data=True), staged)

    def too_far_off(candidate: onnx.ModelProto) -> Verification:
        if any(node.op_type == "InstanceNormalization" for node in candidate.graph.node):
            raise VerificationError("too far off")
        return verify_onnx(candidate, net, example, (1, 3), path=staged)

    lowered = to_onnx._lower(proto, TARGETS["portable"], staged, too_far_off, Stopwatch())
    assert lowered.norms.startswith("two-stage sums")
    assert lowered.verification is not None
    assert max(check.error for check in lowered.verification.checks) < 1e-5
