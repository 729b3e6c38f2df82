"""A compiled model becomes a version in a model repository."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pn_compiler.base.config import DType, ExportConfig
from pn_compiler.base.stopwatch import Stopwatch
from pn_compiler.repository.options import ModelRepository
from pn_compiler.running.inputs import Inputs

if TYPE_CHECKING:
    from pn_compiler.export import Expected, OnnxFile, Report

_BATCHES = (1, 3)


def add_to_repository(
    repository: ModelRepository,
    file: Path,
    golden: "Expected | Inputs",
    report: "Report",
    dtype: DType = ExportConfig.dtype,
    stopwatch: Stopwatch | None = None,
) -> "Report":
    """Writes `file` as a version of a model.

    Args:
        golden: inputs and outputs of the PyTorch model; or only inputs, like which random ones are made, and
            onnxruntime, its optimizations off, gives the outputs.
        report: about `file`.
        dtype: of the weights in `file`.
        stopwatch: announces and times the stage.

    Returns:
        The report about the file in the repository, and where that is.
    """
    from pn_compiler.export import Expected, OnnxFile, default_tolerance
    from pn_compiler.repository.golden_calls import golden_calls
    from pn_compiler.repository.writing import write_repository

    told_elsewhere = ("path", "inputs", "outputs", "opset_version", "ir_version", "repository", "batching")
    compilation = {k: v for k, v in json.loads(report.to_json()).items() if k not in told_elsewhere}
    stopwatch = stopwatch or Stopwatch()
    with stopwatch("repository"):
        model = OnnxFile.read(file)
        by_pytorch = isinstance(golden, Expected)
        if isinstance(golden, Expected):
            inputs, outputs = golden.inputs, golden.outputs(len(model.outputs))
        else:
            inputs, outputs = _answers(file, model, golden)
        written = write_repository(
            repository, model, golden_calls(model, inputs, outputs),
            tolerance=report.tolerance or default_tolerance(getattr(torch, dtype)),
            made={"golden_outputs": "PyTorch" if by_pytorch else "onnxruntime", "compilation": compilation},
        )  # fmt: skip
    return dataclasses.replace(
        report,
        path=str(written.file), repository=str(written.folder), batching=written.batching,
        seconds=stopwatch.seconds,
    )  # fmt: skip


def _answers(
    file: Path, model: "OnnxFile", example: Inputs
) -> tuple[dict[int, Inputs], dict[int, list[Any]]]:
    """Random inputs like `example`, and onnxruntime's outputs, by batch size."""
    from pn_compiler.export import imitate, load_session

    fixed = any(isinstance(value["shape"][0], int) for value in model.inputs if value["shape"])
    batches = (None,) if fixed else _BATCHES
    calls = [imitate(example, batch) for batch in batches]
    inputs = {len(call.tensors()[0]): call for call in calls}
    session = load_session(str(file), optimized=False)
    names = [value["name"] for value in model.inputs]
    return inputs, {
        batch: session.run(None, dict(zip(names, (x.numpy() for x in call.tensors()), strict=True)))
        for batch, call in inputs.items()
    }
