"""Measures which of several files of one network is fastest on this machine, and caches the times."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from pn_compiler.base.errors import ExportError
from pn_compiler.base.files import write_atomically
from pn_compiler.export.sessions import make_session

ROUNDS = 5
_RUNS = 10  # per session
WARM_UP = 3  # runs before the measured ones


def take_turns(
    openers: Mapping[str, Callable[[], Callable[[], object]]],
    done: Callable[[], object],
    *,
    rounds: int,
    runs: int,
) -> dict[str, list[float]]:
    """Seconds per inference, the median over a session, for each of `openers` and each round.

    Only one session is open at a time, because the threads of an idle one spin. Sessions take turns, forwards
    in one round and backwards in the next, so that any drift of the machine affects all of them.

    Args:
        openers: each opens a session and returns a function that runs it once.
        done: called after each session.
        rounds: number of sessions for each.
        runs: number of measured runs per session, after a few to warm up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in openers}
    for index in range(rounds):
        for name in list(openers) if index % 2 else list(openers)[::-1]:
            seconds[name].append(_median_seconds(openers[name](), runs))
            done()
    return seconds


def _median_seconds(run: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(WARM_UP + runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def milliseconds(
    files: Mapping[str, Path],
    feed: Mapping[str, np.ndarray[Any, Any]],
    threads: int | None,
    done: Callable[[], object],
) -> dict[str, float]:
    """Median time of an inference in onnxruntime on the CPU for each of `files`.

    Args:
        files: name -> path of an ONNX file.
        feed: inputs.
        threads: of a session; None is one for each core.
        done: called after each session; each file gets `ROUNDS` of them.
    """

    def opener(path: Path) -> Callable[[], Callable[[], object]]:
        return lambda: functools.partial(make_session(str(path), threads=threads or 0).run, None, dict(feed))

    seconds = take_turns(
        {name: opener(path) for name, path in files.items()}, done, rounds=ROUNDS, runs=_RUNS
    )
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def fingerprint(model: onnx.ModelProto, feed: Mapping[str, np.ndarray[Any, Any]], threads: int | None) -> str:
    """A hash of a network without its weights, its input shapes, onnxruntime, this machine and `threads`."""
    digest = hashlib.sha256()
    shapes = {name: (x.shape, str(x.dtype)) for name, x in feed.items()}
    machine = (onnxruntime.__version__, platform.machine(), _processor(), threads or os.cpu_count())
    digest.update(repr((sorted(shapes.items()), machine)).encode())
    for tensor in model.graph.initializer:
        digest.update(repr((tensor.name, tuple(tensor.dims), tensor.data_type)).encode())
    for node in model.graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _processor() -> str:
    """Model and instruction sets of the CPU, where the system reports them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {line.split(":")[0].strip(): line for line in reversed(lines)}
        return fields.get("model name", "") + fields.get("flags", fields.get("Features", ""))
    return platform.processor()


class TuningCache:
    """Results of earlier measurements: a JSON file in the user's cache, by fingerprint."""

    def __init__(self) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.path = cache / "pn_compiler" / "tuning.json"

    def get(self, key: str) -> dict[str, float] | None:
        """Milliseconds by candidate; None if never measured, or if the file cannot be read."""
        times = self._read().get(key)
        return times if isinstance(times, dict) else None

    def put(self, key: str, times: Mapping[str, float]) -> None:
        """Stores `times`; a cache that cannot be written is not an error."""
        with contextlib.suppress(OSError, ExportError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps(self._read() | {key: dict(times)}, indent=1)
            write_atomically(self.path, content.encode())

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(self.path.read_text())
            return content if isinstance(content, dict) else {}
        return {}
