"""Golden inputs and outputs of an ONNX file, and what a server may do with its batch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime

from pn_compiler.errors import ExportError, VerificationError
from pn_compiler.export.onnx_file import OnnxFile
from pn_compiler.export.verify import imitate, relative_error
from pn_compiler.golden import Arrays
from pn_compiler.inputs import Inputs

Calls = tuple[tuple[Arrays, Arrays], ...]

#: What a model answers: inputs -> its outputs, in order.
Reference = Callable[[Inputs], list[np.ndarray[Any, Any]]]

_BATCHES = (1, 2, 5)


def golden_calls(model: OnnxFile, example: Inputs, reference: Reference, max_batch_size: int) -> Calls:
    """Random inputs like the example in batches of 1, 2 and 5, or in that of the file, and their outputs."""
    fixed = any(isinstance(value["shape"][0], int) for value in model.inputs if value["shape"])
    batches = (None,) if fixed else sorted({min(batch, max_batch_size) for batch in _BATCHES})
    calls = []
    for batch in batches:
        inputs = imitate(example, batch)
        given = [tensor.numpy() for tensor in inputs.tensors()]
        if len(given) != len(model.inputs):
            raise ExportError(f"{len(given)} example inputs for a file with {len(model.inputs)} inputs")
        outputs = reference(inputs)
        calls.append((
            {value["name"]: array for value, array in zip(model.inputs, given, strict=True)},
            {
                value["name"]: output.astype(dtype)
                for value, output, dtype in zip(model.outputs, outputs, model.output_types, strict=True)
            },
        ))  # fmt: skip
    return tuple(calls)


def check_golden(session: onnxruntime.InferenceSession, calls: Calls, tolerance: float) -> None:
    """Raises VerificationError if the file does not give the golden outputs."""
    for inputs, outputs in calls:
        for got, (name, expected) in zip(_run(session, inputs), outputs.items(), strict=True):
            error = relative_error(got, expected)
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
        told = ", ".join(f"{axis} of {name}" for name, axis in axes.items())
        return f"the first axes are not one dynamic batch: {told}"
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
        raise VerificationError(f"onnxruntime fails: {str(error).splitlines()[0]}") from error
