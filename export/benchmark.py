"""A written file beside that of the same network with BatchNorm: speed, size and operators."""

import dataclasses
import functools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from pn_compiler.base.stopwatch import Stopwatch
from pn_compiler.export.options import ExportOptions
from pn_compiler.export.report import Benchmark
from pn_compiler.export.sessions import load_session
from pn_compiler.export.to_onnx import write_onnx
from pn_compiler.export.tuning import take_turns
from pn_compiler.export.verify import batch_size
from pn_compiler.running.inputs import Inputs

_ROUNDS, _RUNS = 5, 10  # sessions of each file, and runs in each


def benchmark(
    original: nn.Module, path: Path, inputs: Inputs, options: ExportOptions, stopwatch: Stopwatch
) -> Benchmark:
    """Exports `original` to a temporary file, and measures it and the file `path` in turn.

    Args:
        original: the network with BatchNorm, in eval mode, for which onnxruntime folds it into convolutions.
        path: the file of the converted network, for onnxruntime.
        inputs: arguments of a call, whose values the files are run on.
        options: those that `path` was written with.

    Raises:
        ExportError: `original` cannot be exported, or one of the files not be run.
    """
    plain = dataclasses.replace(options, verify=False, target="portable", tune=False)
    with stopwatch("benchmark"), tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "batch_norm.onnx")
        written = write_onnx(original, original, before, inputs, plain)
        files = {"BatchNorm": before, "converted": path}
        openers = {
            name: functools.partial(_opened, file, inputs, options.threads) for name, file in files.items()
        }
        seconds = take_turns(openers, lambda: stopwatch.announce("benchmark"), rounds=_ROUNDS, runs=_RUNS)
    pairs = zip(seconds["converted"], seconds["BatchNorm"], strict=True)
    return Benchmark(
        milliseconds={name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        ratio=statistics.median(after / before for after, before in pairs),
        batch=batch_size(inputs),
        threads=options.threads or os.cpu_count() or 1,
        file_bytes=written.file_bytes + written.data_bytes,
        operators=written.operators_after,
    )


def _opened(path: Path, inputs: Inputs, threads: int | None) -> Callable[[], object]:
    """A function that runs `path` once."""
    session = load_session(str(path), threads=threads or 0)
    names = [value.name for value in session.get_inputs()]
    feed = dict(zip(names, (tensor.numpy() for tensor in inputs.tensors()), strict=True))
    return functools.partial(session.run, None, feed)
