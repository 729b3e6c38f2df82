"""A compiled model becomes a version in a model repository."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pn_compiler.graph.pass_base import Progress
from pn_compiler.repository.options import ModelRepository
from pn_compiler.running.inputs import Inputs

if TYPE_CHECKING:
    from pn_compiler.export import DType, Expected, OnnxFile, Report

_BATCHES = (1, 3)


def add_to_repository(
    repository: ModelRepository,
    file: Path,
    golden: "Expected | Inputs",
    report: "Report",
    dtype: "DType" = "float32",
    progress: Progress | None = None,
) -> None:
    """Writes `file` as a version of a model, and notes in `report` where.

    Args:
        golden: inputs and outputs of the PyTorch model; or only inputs, like which random ones are made, and
            onnxruntime, its optimizations off, gives the outputs.
        report: about `file`; its path becomes that in the repository.
        dtype: of the weights in `file`.
    """
    from pn_compiler.export import Expected, OnnxFile, default_tolerance, timed
    from pn_compiler.repository.golden_calls import golden_calls
    from pn_compiler.repository.writing import write_repository

    told_elsewhere = ("path", "inputs", "outputs", "opset_version", "ir_version", "repository", "batching")
    compilation = {k: v for k, v in json.loads(report.to_json()).items() if k not in told_elsewhere}
    with timed(report, "repository", progress or (lambda stage: None)):
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
    report.path = str(written.file)
    report.repository, report.batching = str(written.folder), written.batching


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
