"""Golden inputs and outputs of an ONNX file, and what a server may do with its batch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime

from pn_compiler.base.errors import ExportError, VerificationError, first_line
from pn_compiler.export.onnx_file import OnnxFile
from pn_compiler.export.verify import relative_error
from pn_compiler.repository.golden import Arrays
from pn_compiler.running.inputs import Inputs

Calls = tuple[tuple[Arrays, Arrays], ...]


def golden_calls(
    model: OnnxFile, inputs: Mapping[int, Inputs], outputs: Mapping[int, list[np.ndarray[Any, Any]]]
) -> Calls:
    """The calls of an ONNX file whose inputs and outputs are given by batch size."""
    calls = []
    for batch, call in inputs.items():
        given = [tensor.numpy() for tensor in call.tensors()]
        if len(given) != len(model.inputs):
            raise ExportError(f"{len(given)} example inputs for a file with {len(model.inputs)} inputs")
        found = [y.astype(dtype) for y, dtype in zip(outputs[batch], model.output_types, strict=True)]
        calls.append((
            {value["name"]: array for value, array in zip(model.inputs, given, strict=True)},
            {value["name"]: array for value, array in zip(model.outputs, found, strict=True)},
        ))  # fmt: skip
    return tuple(calls)


def check_golden(session: onnxruntime.InferenceSession, calls: Calls, tolerance: float) -> None:
    """Raises VerificationError if the file does not give the golden outputs."""
    for inputs, outputs in calls:
        for actual, (name, expected) in zip(_run(session, inputs), outputs.items(), strict=True):
            error = relative_error(actual, expected)
            if not error <= tolerance:
                raise VerificationError(
                    f"output {name} differs from the golden one by {error:.1e} (limit {tolerance:.1e}); "
                    "nothing was written"
                )


def why_no_batching(
    model: OnnxFile, session: onnxruntime.InferenceSession, inputs: Arrays, tolerance: float
) -> str:
    """Why a server must not put several requests into one batch; empty if it may.

    Args:
        inputs: of a call with several samples: each must get the same answer alone.
    """
    values = [*model.inputs, *model.outputs]
    axes = {value["name"]: value["shape"][0] if value["shape"] else None for value in values}
    if len(set(axes.values())) > 1 or not isinstance(axes[values[0]["name"]], str):
        listed = ", ".join(f"{axis} of {name}" for name, axis in axes.items())
        return f"the first axes are not one dynamic batch: {listed}"
    flat = [value["name"] for value in values if len(value["shape"]) < 2]
    if flat:
        return f"{flat[0]} has no axis beside the batch"
    together = _run(session, inputs)
    for row in range(len(next(iter(inputs.values())))):
        alone = _run(session, {name: value[row : row + 1] for name, value in inputs.items()})
        if any(relative_error(a, t[row : row + 1]) > tolerance for a, t in zip(alone, together, strict=True)):
            return "the answer to a sample depends on the others of its batch"
    return ""


def _run(session: onnxruntime.InferenceSession, inputs: Arrays) -> list[np.ndarray[Any, Any]]:
    try:
        return [np.asarray(output) for output in session.run(None, inputs)]
    except Exception as error:
        raise VerificationError(f"onnxruntime fails: {first_line(error)}") from error
