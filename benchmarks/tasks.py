"""Runs the tasks of a benchmark in several processes, and reads the file that stores their rows."""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pn_compiler.base.errors import ConfigError
from pn_compiler.base.files import check_writable, write_atomically

Row = dict[str, Any]


def run(function: Callable[..., Row], costs: dict[tuple[Any, ...], float], jobs: int) -> Iterator[Row]:
    """``function(*task)`` for each task of `costs`, as they are ready, in processes of one thread each.

    Args:
        function: at module level, so that it can be pickled.
        costs: each task's share of the progress bar, in the order in which they begin.
        jobs: number of processes.
    """
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, context, _start_worker) as pool,
        tqdm(total=sum(costs.values()), disable=None, leave=False, unit="step") as bar,
    ):
        futures = {pool.submit(function, *task): cost for task, cost in costs.items()}
        try:
            for future in as_completed(futures):
                yield future.result()
                bar.update(futures[future])
        finally:  # whoever stops early does not wait for what has not begun
            pool.shutdown(wait=False, cancel_futures=True)


def run_stored(
    function: Callable[..., Row],
    costs: dict[tuple[Any, ...], float],
    jobs: int,
    rows: list[Row],
    path: Path | None,
) -> None:
    """Appends to `rows` what `run` yields; each time all rows are written to `path`, unless that is None."""
    for row in run(function, costs, jobs):
        rows.append(row)
        if path is not None:
            write_atomically(path, json.dumps(rows, indent=1).encode())


def closing_line(start: float, jobs: int) -> str:
    """How long a benchmark took that began at `start`, by `time.perf_counter`."""
    seconds = time.perf_counter() - start
    return f"{seconds:.0f} s with {jobs} processes of one thread, torch {torch.__version__}"


def _start_worker() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # the momentum of a dead ReLU's weights would become many of them


def read(path: Path | None, *keys: str) -> list[Row]:
    """The rows of an earlier run, each with a value under all `keys`.

    Raises:
        ConfigError: the file holds something else.
        ExportError: it cannot be written.
    """
    if path is not None:
        check_writable(path)
    if path is None or not path.exists():
        return []
    try:
        rows: list[Row] = json.loads(path.read_text())
        return [row for row in rows if all(row[key] for key in keys)]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} was not written by this benchmark: move it away") from error
