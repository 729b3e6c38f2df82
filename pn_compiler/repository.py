"""A compiled model becomes a version in a model repository."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pn_compiler.config import ModelRepository
from pn_compiler.inputs import Inputs
from pn_compiler.pass_base import Progress

if TYPE_CHECKING:
    from pn_compiler.export import Report


def add_to_repository(
    repository: ModelRepository,
    file: Path,
    example: Inputs,
    report: "Report",
    progress: Progress | None = None,
    *,
    model: nn.Module | None = None,
) -> None:
    """Writes `file` as a version of a model, and notes in `report` where.

    Args:
        example: arguments whose shapes and statistics the golden inputs imitate.
        report: about `file`; its path becomes that in the repository.
        model: gives the golden outputs; without, onnxruntime does, its optimizations off.
    """
    from pn_compiler.export import TOLERANCE, load_session, reference_outputs, timed, write_repository

    names = [value["name"] for value in report.inputs]

    def ask_model(call: Inputs) -> list[Any]:
        assert model is not None
        return reference_outputs(model, call, len(report.outputs))

    def ask_onnxruntime(call: Inputs) -> list[Any]:
        session = load_session(str(file), optimized=False)
        feed = dict(zip(names, (x.numpy() for x in call.tensors()), strict=True))
        return [*session.run(None, feed)]

    told_elsewhere = ("path", "inputs", "outputs", "opset_version", "ir_version", "repository", "batching")
    compilation = {k: v for k, v in json.loads(report.to_json()).items() if k not in told_elsewhere}
    with timed(report, "repository", progress or (lambda stage: None)):
        written = write_repository(
            repository, file, example, ask_onnxruntime if model is None else ask_model,
            tolerance=report.tolerance or TOLERANCE,
            made={
                "golden_outputs": "onnxruntime" if model is None else "PyTorch",
                "compilation": compilation,
            },
        )  # fmt: skip
    report.path = str(written.file)
    report.repository, report.batching = str(written.folder), written.batching
