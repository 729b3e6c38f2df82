"""Runs an ONNX file over a folder of images or arrays, or over parquet, so that it can be resumed.

    .venv-ray/bin/python examples/ray_batch.py demo_output/model.onnx INPUT OUTPUT

INPUT is a folder of images or .npy files, one sample each, whose identifier is the path; or a parquet file,
or a folder of them, with a column of arrays and one of identifiers, which no two rows share. OUTPUT/rows gets
parquet files with the identifier and a column for each output. If the run is stopped, however, the same
command processes the rest: each row is in the output once. With nothing left it does nothing.

On the cluster at RAY_ADDRESS, or else on this machine. In a cluster all nodes must see INPUT and OUTPUT.
"""

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.dataset
import ray
from PIL import Image
from ray.data.checkpoint import CheckpointConfig

FILES = (".npy", ".png", ".jpg", ".jpeg", ".bmp", ".webp")
LEAST_CPUS = 4  # of the cluster: Ray Data waits forever where reader, filter, worker and writer do not fit
Batch = dict[str, np.ndarray]


class Predict:
    """The session of one worker."""

    def __init__(self, model: bytes, column: str, identifier: str) -> None:
        self.session = load(model)
        self.column, self.identifier = column, identifier

    def __call__(self, batch: Batch) -> Batch:
        values = np.stack(list(batch[self.column])).astype(np.float32)
        outputs = self.session.run(None, {self.session.get_inputs()[0].name: values})
        names = [output.name for output in self.session.get_outputs()]
        return {self.identifier: batch[self.identifier], **dict(zip(names, outputs, strict=True))}


def load(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def decode(row: dict[str, Any]) -> dict[str, Any]:
    """The sample in one file: an array as it is, an image as [C, H, W] from 0 to 1."""
    content = io.BytesIO(row["bytes"])
    try:
        if row["path"].lower().endswith(".npy"):
            values = np.load(content, allow_pickle=False)
        else:
            values = np.asarray(Image.open(content), np.float32) / 255
            values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{row['path']} does not hold an image or an array: {error}") from error
    return {"path": row["path"], "values": values}


def find(source: Path, column: str, identifier: str) -> tuple[list[str], bool, int]:
    """(files, whether they are parquet, number of rows). Raises ValueError."""
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
    tables = [str(path) for path in files if path.suffix == ".parquet"]
    samples = [str(path) for path in files if path.suffix.lower() in FILES]
    if bool(tables) == bool(samples):
        kinds = "both parquet and" if tables else "neither parquet nor"
        raise ValueError(f"{source} holds {kinds} files of samples ({', '.join(FILES)})")
    if samples:
        return samples, False, len(samples)
    data = pyarrow.dataset.dataset(tables)
    if missing := {column, identifier} - set(data.schema.names):
        raise ValueError(f"{source} has the columns {data.schema.names}, and not {sorted(missing)}")
    return tables, True, data.count_rows()


@contextlib.contextmanager
def claimed(output: Path, job: dict[str, str]) -> Iterator[None]:
    """Locks `output` for this process. Raises ValueError if another process or job uses it."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "job.json").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {output}") from None
        file.seek(0)
        before = file.read()
        if not before.endswith("}\n"):  # new, or stopped before there was a row
            file.truncate(0)
            file.write(json.dumps(job) + "\n")
            file.flush()
        elif json.loads(before) != job:
            raise ValueError(f"{output} holds rows of another job, {before.strip()}: give another folder")
        yield


def run(arguments: argparse.Namespace) -> str:
    """Processes the rows that are missing. Returns a summary; raises ValueError."""
    model = arguments.model.read_bytes()
    try:
        load(model)
    except Exception as error:
        raise ValueError(f"onnxruntime does not load {arguments.model}: {error}") from error
    source, output = arguments.input.resolve(), arguments.output.resolve()
    column, identifier = arguments.column, arguments.id
    files, tables, expected = find(source, column, identifier)
    job = {"model": hashlib.sha256(model).hexdigest(), "input": str(source)}
    with claimed(output, job):
        connect()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = sys.stderr.isatty()
        context.checkpoint_config = CheckpointConfig(
            identifier if tables else "path", str(output / "progress"), delete_checkpoint_on_success=False
        )
        if tables:
            rows = ray.data.read_parquet(files).select_columns([identifier, column])
        else:
            column, identifier = "values", "path"
            rows = ray.data.read_binary_files(files, include_paths=True).map(decode)
        predicted = rows.repartition(target_num_rows_per_block=arguments.part).map_batches(
            Predict,
            fn_constructor_args=(model, column, identifier),
            batch_size=arguments.batch_size,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=arguments.workers),
            num_cpus=arguments.cpus,
        )
        predicted.write_parquet(str(output / "rows"))
        done = pyarrow.dataset.dataset(output / "rows", format="parquet").count_rows()
    if done != expected:
        raise ValueError(f"{source} has {expected} rows, and {output} {done}: do rows share an identifier?")
    return f"{done} rows in {output / 'rows'}"


def connect() -> None:
    """Connects to the cluster at RAY_ADDRESS, or starts one. Raises ValueError if it is too small."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    alone: dict[str, Any] = {
        "address": "local",
        "_node_ip_address": "127.0.0.1",
        "include_dashboard": False,
        "num_cpus": max(LEAST_CPUS, os.cpu_count() or 1),
    }
    given = {} if "RAY_ADDRESS" in os.environ else alone
    ray.init(log_to_driver=False, logging_level="error", **given)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    cpus = ray.cluster_resources().get("CPU", 0)
    if cpus < LEAST_CPUS:
        raise ValueError(f"the cluster has {cpus:g} CPUs, and at least {LEAST_CPUS} are needed")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="ONNX file with one input")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--column", default="values", help="of parquet: the samples; default %(default)s")
    parser.add_argument("--id", default="id", help="of parquet: the identifiers; default %(default)s")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--part", type=int, default=1024, help="rows that are written, or lost, together; default %(default)s"
    )
    parser.add_argument("--workers", type=int, default=2, help="at most; default %(default)s")
    parser.add_argument("--cpus", type=float, default=0.5, help="of a worker; default %(default)s")
    arguments = parser.parse_args()
    try:
        print(run(arguments))
    except ray.exceptions.RayTaskError as error:
        causes = re.findall(
            r"^\w*Error: (.*)", str(error), re.MULTILINE
        )  # below the tracebacks of the worker
        print(f"ray_batch: {causes[-1] if causes else error.cause}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"ray_batch: {error}", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
