"""examples/ray_batch.py: killed midway and resumed, each row is in the output once."""

import fcntl
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import pn_compiler
from pn_compiler.testing import randomize_batch_norms
from tests.serving.ray_cluster import MARK, ROOT, wait_for
from tests.serving.ray_watchdog import kill

pa = pytest.importorskip("pyarrow")  # Ray brings it
dataset = pytest.importorskip("pyarrow.dataset")
pq = pytest.importorskip("pyarrow.parquet")

FILES, ROWS = 24, 200  # of parquet; rows of a file


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    pn_compiler.compile(randomize_batch_norms(network).eval(), path, torch.randn(1, 1, 8, 8))
    return path


class Run:
    """The command, with all processes that it starts."""

    def __init__(self, *arguments: object) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "examples/ray_batch.py", *map(str, arguments)],
            cwd=ROOT, env=os.environ | {MARK: self.mark}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        kill(MARK, self.mark, self.process)
        self.process.communicate()

    def finish(self) -> tuple[int, str]:
        """(exit status, the last line of its output)"""
        out, err = self.process.communicate(timeout=200)
        return self.process.returncode, (out or err).strip().splitlines()[-1]


def committed(output: Path) -> list[Path]:
    """One file for each file of rows that is whole."""
    return [path for path in output.glob("progress/*.parquet") if ".pending." not in path.name]


def rows_of(output: Path, identifier: str) -> tuple[list[Any], np.ndarray]:
    table = dataset.dataset(output / "rows", format="parquet").to_table().sort_by(identifier)
    (name,) = set(table.column_names) - {identifier}
    return table[identifier].to_pylist(), np.array(table[name].to_pylist(), np.float32)


def expected(model: Path, values: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model)
    return session.run(None, {session.get_inputs()[0].name: values})[0]


def test_killed_midway_and_resumed(model, tmp_path) -> None:
    values = np.random.default_rng(0).random((FILES * ROWS, 1, 8, 8), dtype=np.float32)
    (tmp_path / "input").mkdir()
    for start in range(0, FILES * ROWS, ROWS):
        part = values[start : start + ROWS]
        columns = {
            "id": range(start, start + ROWS),
            "values": pa.FixedShapeTensorArray.from_numpy_ndarray(part),
        }
        pq.write_table(pa.table(columns), tmp_path / "input" / f"{start:06}.parquet")  # fmt: skip
    output = tmp_path / "output"
    arguments = (model, tmp_path / "input", output, "--part", ROWS, "--batch-size", 4)

    with Run(*arguments) as run:
        wait_for(lambda: len(committed(output)) > 1, 120)
        kill(MARK, run.mark, run.process)
        assert run.process.returncode == -9
    last, *kept = committed(output)
    before = sum(pq.read_metadata(path).num_rows for path in kept)
    assert 0 < before < len(values) - ROWS
    last.rename(last.with_suffix(".pending.parquet"))  # killed between writing rows and committing them
    (orphan,) = output.glob(f"rows/{last.stem}*")
    orphan.write_bytes(orphan.read_bytes()[:-10])  # or while writing them

    with Run(*arguments) as run:
        assert run.finish() == (0, f"{len(values)} rows in {output / 'rows'}")
    identifiers, found = rows_of(output, "id")
    assert identifiers == list(range(len(values)))
    assert np.abs(found - expected(model, values)).max() < 1e-5
    assert not orphan.exists()
    assert all(path.exists() for path in kept)


def test_images_and_arrays(model, tmp_path) -> None:
    folder = tmp_path / "input" / "deeper"
    folder.mkdir(parents=True)
    images = np.random.default_rng(1).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    scaled = images[:, None].astype(np.float32) / 255
    for number, image in enumerate(images):
        if number % 2:
            np.save(folder / f"{number}.npy", scaled[number])
        else:
            Image.fromarray(image).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("not a sample")
    output = tmp_path / "output"
    broken = folder / "a.png"
    broken.write_bytes(b"not an image")
    with Run(model, tmp_path / "input", output) as run:
        status, message = run.finish()
    expected = f"ray_batch: {broken} does not hold an image or an array: "
    assert (status, message.startswith(expected)) == (1, True), message
    broken.unlink()
    with Run(model, tmp_path / "input", output) as run:
        assert run.finish() == (0, f"6 rows in {output / 'rows'}")
    paths, found = rows_of(output, "path")
    assert [Path(path).stem for path in paths] == list("012345")
    assert np.abs(found - expected(model, scaled)).max() < 1e-5

    with (output / "job.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with Run(model, tmp_path / "input", output) as run:
            assert run.finish() == (1, f"ray_batch: another run is writing to {output}")
    other = tmp_path / "other.onnx"
    other.write_bytes(model.read_bytes()[:-1])
    with Run(other, tmp_path / "input", output) as run:
        status, message = run.finish()
    assert (status, "onnxruntime does not load" in message) == (1, True)
    with Run(model, folder, output) as run:
        status, message = run.finish()
    assert (status, "holds rows of another job" in message) == (1, True)
    with Run(model, tmp_path / "nothing", output) as run:
        status, message = run.finish()
    assert (status, "holds neither parquet nor" in message) == (1, True)
