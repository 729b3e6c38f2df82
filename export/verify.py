"""Whether an ONNX model computes what the PyTorch model computes."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pn_compiler.errors import ExportError, VerificationError
from pn_compiler.export.report import Check
from pn_compiler.inputs import Inputs

#: Relative to the largest magnitude of an output. onnxruntime's InstanceNormalization sums in float32: deep
#: networks were seen to reach 1.1e-5 (fcn_resnet50, maxvit_t at 224 pixels).
TOLERANCE = 1e-4
_FLOAT32_FACTOR = 4.0


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    checks: tuple[Check, ...]
    tolerance: float
    float32_error: float
    reference: str


def verify_onnx(
    proto: onnx.ModelProto,
    model: nn.Module,
    example: Inputs,
    batches: Sequence[int | None],
    *,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Compares an ONNX model with `model` in float64, onnxruntime's optimizations off and on.

    The limit is `tolerance`, or four times the error of PyTorch's own float32 result where the network
    amplifies rounding so much that this is more.

    Args:
        proto: the ONNX model.
        model: the PyTorch model, not folded, in eval mode.
        example: arguments whose shapes and statistics are imitated.
        batches: batch sizes to try; None is that of the example.
        tolerance: see above.

    Raises:
        VerificationError: an output differs by more than the limit, is not finite, or cannot be computed.
    """
    wide, reference_dtype = _reference(model, imitate(example, batches[0]))
    names = [value.name for value in proto.graph.output]
    input_names = [value.name for value in proto.graph.input]
    serialized = proto.SerializeToString()
    inputs = {_batch(x): x for x in (imitate(example, batch) for batch in batches)}
    count = len(names)
    expected = {batch: _run(wide, _cast(x, reference_dtype), count) for batch, x in inputs.items()}
    narrow = {batch: _run(model, x, count) for batch, x in inputs.items()}
    float32_error = max(_worst(narrow[b], expected[b], names)[1] for b in inputs)
    if not np.isfinite(float32_error):
        raise VerificationError("the PyTorch model's own output is not finite on random inputs")
    limit = max(tolerance, _FLOAT32_FACTOR * float32_error)
    checks = []
    for optimized in (False, True):
        try:
            session = make_session(serialized, optimized=optimized)  # one at a time
        except Exception as error:
            raise VerificationError(
                f"onnxruntime cannot load the model: {str(error).splitlines()[0]}"
            ) from error
        for batch, x in inputs.items():
            feed = dict(zip(input_names, (value.numpy() for value in x.tensors()), strict=True))
            try:
                outputs = [np.asarray(output) for output in session.run(names, feed)]
            except Exception as error:
                raise VerificationError(
                    f"onnxruntime fails at batch {batch}: {str(error).splitlines()[0]}"
                ) from error
            output, worst = _worst(outputs, expected[batch], names)
            if not worst <= limit:
                raise VerificationError(
                    f"output {output} differs from PyTorch by {worst:.1e} relative to its largest "
                    f"magnitude at batch {batch} (limit {limit:.1e}), onnxruntime's optimizations "
                    f"{'on' if optimized else 'off'}; nothing was written"
                )
            checks.append(Check(batch, optimized, output, worst))
        del session
    return Verification(tuple(checks), limit, float32_error, str(reference_dtype).removeprefix("torch."))


def make_session(
    model: bytes | str, *, optimized: bool = True, threads: int = 0
) -> onnxruntime.InferenceSession:
    """An onnxruntime CPU session; `threads` 0 means all cores."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = threads
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def load_session(path: str, *, optimized: bool = True) -> onnxruntime.InferenceSession:
    """A session of a file, loaded as a server does: external data are found beside it or not at all.

    Raises:
        ExportError: onnxruntime cannot load it.
    """
    try:
        return make_session(path, optimized=optimized)
    except Exception as error:
        raise ExportError(f"onnxruntime cannot load {path}: {str(error).splitlines()[0]}") from error


def reference_outputs(model: nn.Module, inputs: Inputs, count: int) -> list[np.ndarray[Any, Any]]:
    """The `count` outputs that the ONNX model of `model` must give, in float64 where that can be run."""
    wide, dtype = _reference(model, inputs)
    return _run(wide, _cast(inputs, dtype), count)


def imitate(example: Inputs, batch: int | None) -> Inputs:
    """Random inputs of batch size `batch` with the shapes, dtypes, means and deviations of the example.

    Integers and booleans are drawn from the values of the example. None keeps its batch size.
    """
    generator = torch.Generator().manual_seed(batch or 0)

    def like(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        shape = tensor.shape if batch is None or not tensor.dim() else (batch, *tensor.shape[1:])
        if not tensor.is_floating_point():
            return tensor.flatten()[torch.randint(tensor.numel(), shape, generator=generator)]
        wide = tensor.double()
        deviation = float(wide.std()) if tensor.numel() > 1 else 0.0
        noise = torch.randn(shape, generator=generator)
        return (noise * (deviation or 1.0) + float(wide.mean())).to(tensor.dtype)

    return example.map(like)


def _batch(inputs: Inputs) -> int:
    first = inputs.tensors()[0]
    return first.shape[0] if first.dim() else 1


@torch.no_grad()
def _reference(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, torch.dtype]:
    """`model` in float64, or as it is if it cannot be run so, and the dtype that its inputs take."""
    wide = copy.deepcopy(model).double()
    try:
        _cast(inputs, torch.float64).call(wide)
    except (RuntimeError, TypeError):  # a dtype is written into the forward
        return model, torch.float32
    return wide, torch.float64


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return inputs.map(lambda x: x.to(dtype) if x.is_floating_point() else x)


def _run(model: nn.Module, inputs: Inputs, count: int) -> list[np.ndarray[Any, Any]]:
    """The `count` outputs of `model` that the ONNX model has: its tensors, and sizes if they vary."""
    try:
        with torch.no_grad():
            outputs = pytree.tree_leaves(inputs.call(model))
    except Exception as error:  # whatever its forward raises
        raise VerificationError(
            f"the PyTorch model fails at batch {_batch(inputs)}: {str(error).splitlines()[0]}; if it takes "
            "one batch size only, try a static batch"
        ) from error
    tensors = [output for output in outputs if isinstance(output, Tensor)]
    if len(tensors) != count:
        tensors = [torch.as_tensor(output) for output in outputs if isinstance(output, Tensor | int)]
    if len(tensors) != count:
        raise VerificationError(f"the ONNX model has {count} outputs, PyTorch gives {len(tensors)}")
    return [tensor.numpy() for tensor in tensors]


def _worst(
    got: list[np.ndarray[Any, Any]], expected: list[np.ndarray[Any, Any]], names: list[str]
) -> tuple[str, float]:
    """(name, relative error) of the output that is furthest from what is expected."""
    errors = [(relative_error(g, e), name) for g, e, name in zip(got, expected, names, strict=True)]
    error, name = max(errors)
    return name, error


def relative_error(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Largest absolute difference, relative to the largest magnitude expected; inf if not comparable."""
    if got.shape != expected.shape or not np.isfinite(expected).all():
        return float("inf")
    if got.size == 0:
        return 0.0
    difference = float(np.abs(got.astype(np.float64) - expected.astype(np.float64)).max())
    largest = float(np.abs(expected.astype(np.float64)).max())
    if np.isnan(difference):
        return float("inf")
    return difference / largest if largest > 0 else difference
