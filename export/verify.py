"""Verifies that an ONNX model computes what the PyTorch model computes."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pn_compiler.base.errors import VerificationError, first_line
from pn_compiler.export.report import Check
from pn_compiler.export.sessions import make_session
from pn_compiler.running.evaluation import seed_everything, untouched
from pn_compiler.running.float64 import Float64
from pn_compiler.running.inputs import Inputs

#: Relative to the largest magnitude of an output. onnxruntime's InstanceNormalization sums in float32: deep
#: networks were seen to reach 1.1e-5 (fcn_resnet50, maxvit_t at 224 pixels).
TOLERANCE = 1e-4
#: The limit regardless of PyTorch's own error; beyond it, calling a file verified would be wrong.
MOST_TOLERATED = 1e-2
_OWN_FACTOR = 4.0
_EPS_FACTOR = 4.0  # for dtypes shorter than float32
_LARGEST_OWN = 0.25  # beyond it, a comparison is meaningless


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    checks: tuple[Check, ...]
    tolerance: float
    float32_error: float
    reference: str
    dtype: str = "float32"
    runtime: str = "onnxruntime"


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """The outputs of a PyTorch model, to compare ONNX models with.

    Attributes:
        inputs: arguments of a call, by batch size.
        reference: the outputs for each, computed in `reference_dtype`, usually float64.
        actual: PyTorch's own outputs in `dtype`.
        reference_dtype: name of the dtype of `reference`.
        dtype: dtype of the ONNX model.
        random: whether the model draws random numbers.
        varying: for each output in `actual`, whether it changes in another call with other random numbers:
            then its difference from `reference` is not just rounding.
        sizes: of the axes that may have any, if they are not those of the example.
        resized: the same for other sizes of those, or None.
    """

    inputs: dict[int, Inputs]
    reference: dict[int, list[Any]]
    actual: dict[int, list[Any]]
    reference_dtype: str
    dtype: torch.dtype = torch.float32
    random: bool = False
    varying: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    sizes: str = ""
    resized: "Expected | None" = None

    def in_dtype(self, model: nn.Module, dtype: torch.dtype) -> "Expected":
        """The outputs expected of an ONNX model in `dtype`; `model` is the original in PyTorch."""
        actual = {batch: _leaves(model, x) for batch, x in self.inputs.items()}
        resized = self.resized and self.resized.in_dtype(model, dtype)
        return dataclasses.replace(self, actual=actual, dtype=dtype, resized=resized)

    def outputs(self, count: int) -> dict[int, list[np.ndarray[Any, Any]]]:
        """The `count` outputs expected of the ONNX model, by batch size."""
        return {batch: _arrays(leaves, count) for batch, leaves in self.reference.items()}

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def default_tolerance(dtype: torch.dtype) -> float:
    """The limit relative to the largest magnitude: a multiple of a single rounding in `dtype`."""
    return TOLERANCE if dtype == torch.float32 else _EPS_FACTOR * torch.finfo(dtype).eps


def expect(model: nn.Module, example: Inputs, batches: Sequence[int | None]) -> Expected:
    """Runs `model` on random inputs of each batch size, in float64 and in its own dtype.

    Args:
        model: the PyTorch model; it is run in eval mode and left as it was.
        example: arguments whose shapes and statistics the inputs imitate.
        batches: batch sizes to try; None is the example's.
    """
    inputs = {batch_size(x): x for x in (imitate(example, batch) for batch in batches)}
    reference_dtype = torch.float64
    with untouched(model, keep_state=True):
        seed_everything()
        before = torch.get_rng_state()
        actual = {batch: own_leaves(model, x) for batch, x in inputs.items()}
        random = not torch.equal(before, torch.get_rng_state())
        seed_everything(1)
        again = {batch: own_leaves(model, x) for batch, x in inputs.items()}
        try:
            seed_everything()
            with Float64(model):
                reference = {batch: _leaves(model, _cast(x, torch.float64)) for batch, x in inputs.items()}
        except (RuntimeError, TypeError):  # a dtype is written into the forward
            reference_dtype = torch.float32
            reference = actual
    varying = {batch: list(map(_varies, leaves, again[batch])) for batch, leaves in actual.items()}
    name = str(reference_dtype).removeprefix("torch.")
    return Expected(inputs, reference, actual, name, random=random, varying=varying)


def _varies(one: Any, other: Any) -> Any:
    """For each output, whether two calls differ by more than the limit allows; the structure is kept."""
    if not isinstance(one, Tensor):
        return 0
    same = torch.equal(one.nan_to_num(), other.nan_to_num())
    return torch.tensor(not same and relative_error(other.numpy(), one.numpy()) > TOLERANCE / _OWN_FACTOR)


def verify_onnx(
    proto: onnx.ModelProto,
    model: nn.Module | Expected,
    example: Inputs | None = None,
    batches: Sequence[int | None] = (),
    *,
    tolerance: float | None = None,
    path: Path | None = None,
) -> Verification:
    """Compares an ONNX model with PyTorch in float64, onnxruntime's optimizations off and on.

    The limit is `tolerance` or, if the network amplifies rounding so much that this is larger, four times the
    error of PyTorch's own result in the dtype of the ONNX model, up to 1e-2. onnxruntime does not support
    bfloat16 on the CPU; such a model runs in ONNX's reference evaluator instead.

    Args:
        proto: the ONNX model.
        model: the result of `expect`, or the PyTorch model, not folded, in eval mode.
        example, batches: as for `expect`.
        tolerance: see above; by default `default_tolerance` of the dtype.
        path: the file of `proto`, if its weights are in a separate file.

    Raises:
        VerificationError: an output differs by more than the limit, is not finite, or cannot be computed.
    """
    if not isinstance(model, Expected):
        assert example is not None
        model = expect(model, example, batches)
    names = [value.name for value in proto.graph.output]
    expected = model.outputs(len(names))
    actual = {batch: _arrays(leaves, len(names)) for batch, leaves in model.actual.items()}
    varying = _varying(model, names)
    steady = [place for place in range(len(names)) if names[place] not in varying]
    float32_error = _own_error(model, actual, expected, steady)
    least = default_tolerance(model.dtype) if tolerance is None else tolerance
    limit = max(least, min(_OWN_FACTOR * float32_error, MOST_TOLERATED))
    source = proto.SerializeToString() if path is None else str(path)
    checks, at = [], f" and {model.sizes}" if model.sizes else ""
    in_reference = model.dtype == torch.bfloat16
    for optimized in (False,) if in_reference else (False, True):
        how = "in ONNX's reference evaluator" if in_reference else (
            f"onnxruntime's optimizations {'on' if optimized else 'off'}"
        )  # fmt: skip
        runs = _evaluate(source, proto, model.inputs) if in_reference else _outputs(
            source, proto, model.inputs, optimized=optimized
        )  # fmt: skip
        for batch, outputs in runs:
            output, worst = _worst(outputs, expected[batch], names)
            if not worst <= limit:
                own = f"PyTorch itself in {model.dtype_name} is off by {float32_error:.1e}"
                if model.random or output in varying:
                    own += "; it draws random numbers or keeps state in eval mode, which a file cannot repeat"
                raise VerificationError(
                    f"output {output} differs from PyTorch by {worst:.1e} relative to its largest "
                    f"magnitude at batch {batch}{at} (limit {limit:.1e}; {own}), {how}; nothing was written"
                )
            checks.append(Check(batch, optimized, output, worst, model.sizes))
    if model.resized is not None:
        checks += verify_onnx(proto, model.resized, tolerance=tolerance, path=path).checks
    runtime = "ONNX's reference evaluator" if in_reference else "onnxruntime"
    return Verification(tuple(checks), limit, float32_error, model.reference_dtype, model.dtype_name, runtime)


def _varying(model: Expected, names: list[str]) -> set[str]:
    """Names of the outputs that vary from call to call, whatever the batch size."""
    varying = (zip(names, _arrays(leaves, len(names)), strict=True) for leaves in model.varying.values())
    return {name for of_batch in varying for name, varies in of_batch if varies}


def _own_error(
    model: Expected, actual: dict[int, list[Any]], expected: dict[int, list[Any]], steady: list[int]
) -> float:
    """PyTorch's own error in the dtype of the file, on the `steady` outputs, which do not vary by call.

    Raises:
        VerificationError: it is too large to compare anything.
    """
    pairs = ((actual[b][place], expected[b][place]) for b in expected for place in steady)
    error = max(itertools.starmap(relative_error, pairs), default=0.0)
    if not np.isfinite(error):
        own = "" if model.dtype == torch.float32 else f" in {model.dtype_name}"
        raise VerificationError(f"the PyTorch model's own output{own} is not finite on random inputs")
    if model.dtype != torch.float32 and error > _LARGEST_OWN:
        raise VerificationError(
            f"in {model.dtype_name} PyTorch's own output is off by {error:.0%} on random inputs: "
            "use float32 for this network"
        )
    return error


def _outputs(
    source: bytes | str, proto: onnx.ModelProto, inputs: Mapping[int, Inputs], *, optimized: bool
) -> Iterator[tuple[int, list[np.ndarray[Any, Any]]]]:
    """Batch size and onnxruntime's outputs for each of `inputs`, in one session with torch's thread count."""
    try:
        session = make_session(source, optimized=optimized, threads=torch.get_num_threads())
    except Exception as error:
        raise VerificationError(f"onnxruntime cannot load the model: {first_line(error)}") from error
    names = [value.name for value in proto.graph.input]
    for batch, x in inputs.items():
        feed = dict(zip(names, (value.numpy() for value in x.tensors()), strict=True))
        try:
            yield batch, [np.asarray(output) for output in session.run(None, feed)]
        except Exception as error:
            raise VerificationError(f"onnxruntime fails at batch {batch}: {first_line(error)}") from error


def _evaluate(
    source: bytes | str, proto: onnx.ModelProto, inputs: Mapping[int, Inputs]
) -> Iterator[tuple[int, list[np.ndarray[Any, Any]]]]:
    """Batch size and the outputs of ONNX's reference evaluator for each of `inputs`."""
    from onnx.reference import ReferenceEvaluator

    names = [value.name for value in proto.graph.input]
    try:
        evaluator = ReferenceEvaluator(source)
        for batch, x in inputs.items():
            feed = dict(zip(names, (value.numpy() for value in x.tensors()), strict=True))
            yield batch, [np.asarray(output) for output in evaluator.run(None, feed)]
    except Exception as error:
        raise VerificationError(
            f"ONNX's reference evaluator cannot run the model: {first_line(error)}; "
            "without verification it can be written"
        ) from error


def imitate(example: Inputs, batch: int | None) -> Inputs:
    """Random inputs of batch size `batch` with the example's shapes, dtypes, means and deviations.

    Integers and booleans are drawn from the example's values. None keeps its batch size.
    """
    generator = torch.Generator().manual_seed(batch or 0)

    def like(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        shape = tensor.shape if batch is None or not tensor.dim() else (batch, *tensor.shape[1:])
        if not tensor.is_floating_point() and not tensor.numel():
            return tensor.new_zeros(shape)
        if not tensor.is_floating_point():
            return tensor.flatten()[torch.randint(tensor.numel(), shape, generator=generator)]
        wide = tensor.double()
        deviation = float(wide.std()) if tensor.numel() > 1 else 0.0
        noise = torch.randn(shape, generator=generator)
        mean = float(wide.mean()) if tensor.numel() else 0.0
        return (noise * (deviation or 1.0) + mean).to(tensor.dtype)

    return example.map(like)


def batch_size(inputs: Inputs) -> int:
    """Length of the first axis of the first tensor."""
    first = inputs.tensors()[0]
    return first.shape[0] if first.dim() else 1


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return inputs.map(lambda x: x.to(dtype) if x.is_floating_point() else x)


@torch.no_grad()
def _leaves(model: nn.Module, inputs: Inputs) -> list[Any]:
    """The tensors and numbers in the output of `model`."""
    leaves = pytree.tree_leaves(inputs.call(model))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor | int)]


def own_leaves(model: nn.Module, inputs: Inputs) -> list[Any]:
    """The same; raises VerificationError if `model` fails, whatever its forward raises."""
    try:
        return _leaves(model, inputs)
    except Exception as error:  # its forward can raise anything
        raise VerificationError(
            f"the PyTorch model fails at batch {batch_size(inputs)}: {first_line(error)}; if it takes "
            "one batch size only, try a static batch"
        ) from error


def _arrays(leaves: list[Any], count: int) -> list[np.ndarray[Any, Any]]:
    """The `count` values among `leaves` that the ONNX model returns: the tensors, and sizes if they vary."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if len(tensors) != count:
        tensors = [torch.as_tensor(leaf) for leaf in leaves]
    if len(tensors) != count:
        raise VerificationError(f"the ONNX model has {count} outputs, PyTorch gives {len(tensors)}")
    return [(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).numpy() for t in tensors]


def _worst(
    actual: list[np.ndarray[Any, Any]], expected: list[np.ndarray[Any, Any]], names: list[str]
) -> tuple[str, float]:
    """(name, relative error) of the output that is furthest from the expected one."""
    errors = [(relative_error(g, e), name) for g, e, name in zip(actual, expected, names, strict=True)]
    error, name = max(errors)  # none is nan, which max would miss
    return name, error


def relative_error(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Largest absolute difference, relative to the largest magnitude expected; inf if not comparable."""
    comparable = actual.shape == expected.shape and actual.dtype.kind == expected.dtype.kind
    if not (comparable and np.isfinite(expected).all() and np.isfinite(actual).all()):
        return float("inf")
    if actual.size == 0:
        return 0.0
    difference = float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max())
    largest = float(np.abs(expected.astype(np.float64)).max())
    return difference / largest if largest > 0 else difference
