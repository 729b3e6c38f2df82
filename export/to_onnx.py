"""From a PyTorch model to a verified ONNX file."""

import contextlib
import functools
import importlib.metadata
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.utils import _pytree as pytree

from pn_compiler.errors import ExportError, VerificationError
from pn_compiler.export.depthwise_affine import use_depthwise_affines
from pn_compiler.export.external_data import data_file, move_weights_out, needs_external_data
from pn_compiler.export.files import check_writable, publish, staging_folder, write_atomically
from pn_compiler.export.half import DTYPES, DType, check_dtype, in_half
from pn_compiler.export.names import Names, rename
from pn_compiler.export.report import Report, count_onnx_operators, describe_values
from pn_compiler.export.runtimes import DEFAULT_OPSET
from pn_compiler.export.simplify import freeze_reshapes
from pn_compiler.export.two_stage_norm import with_two_stage_norms
from pn_compiler.export.verify import Expected, Verification, expect, imitate, verify_onnx
from pn_compiler.graph_utils import count_parameters
from pn_compiler.inputs import Inputs
from pn_compiler.pass_base import Progress

logger = logging.getLogger(__name__)

VERIFIED_BATCHES = (1, 3)


def write_onnx(
    folded: nn.Module,
    reference: nn.Module | Expected,
    path: Path,
    inputs: Inputs,
    *,
    opset_version: int = DEFAULT_OPSET,
    dynamic_batch: bool = True,
    names: Names | None = None,
    external_data: bool = False,
    dtype: DType = "float32",
    verify: bool = True,
    tolerance: float | None = None,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Report:
    """Exports `folded` to `path`, after comparing the result with `reference`.

    Args:
        folded: what is exported, in eval mode.
        reference: what it is compared with: the model in eval mode, or what `expect` gave for it.
        path: written whole or not at all, at the very end.
        inputs: arguments of a call; the first axis of each tensor is the batch.
        opset_version: ONNX operator set, 18 to 24.
        dynamic_batch: whether the file takes any batch size; else that of the example.
        names: of the inputs and outputs.
        external_data: whether the weights go to ``<path>.data``, as they do anyway if they exceed 2 GB.
        dtype: of weights and activations; normalizers, inputs and outputs are float32.
        verify: whether the result is compared, with onnxruntime, at batch 1 and 3.
        tolerance: largest relative error; see `pn_compiler.export.verify`.
        report: filled in, if given.
        progress: told the name of each stage.

    Raises:
        ExportError: bad arguments, the exporter fails, or the file cannot be written.
        VerificationError: the ONNX model computes something else.
    """
    _check_arguments(path, inputs)
    check_dtype(dtype, opset_version)
    report = Report() if report is None else report
    say = progress or (lambda stage: None)
    with contextlib.ExitStack() as stack:
        staged = None
        if external_data or needs_external_data(folded):
            staged = stack.enter_context(staging_folder(path)) / path.name
        compare = None
        if verify and not isinstance(reference, Expected):
            with timed(report, "reference", say):
                reference = expect(reference, inputs, verified_batches(dynamic_batch))
        if dtype != "float32":
            folded = in_half(folded, DTYPES[dtype])
        if isinstance(reference, Expected):
            if dtype != "float32":
                reference = reference.in_dtype(folded, DTYPES[dtype])
            compare = functools.partial(verify_onnx, model=reference, tolerance=tolerance, path=staged)
        export = functools.partial(
            _export_and_verify, inputs, opset_version, dynamic_batch, names or Names(), staged, compare,
            report=report, say=say,
        )  # fmt: skip
        try:
            proto = export(folded)
        except VerificationError as error:
            careful = with_two_stage_norms(folded)
            if careful is None:
                raise
            logger.info("%s; trying again with two-stage sums in the normalizers", error)
            proto = export(careful)
            report.norms = "two-stage sums, for InstanceNormalization was too far off"
        with timed(report, "write", say):
            _write(proto, path, staged, report)
    report.opset_version, report.ir_version = opset_version, proto.ir_version
    report.inputs = describe_values(proto.graph.input)
    report.outputs = describe_values(proto.graph.output)
    report.operators_after = count_onnx_operators(proto)
    report.parameters_after = count_parameters(folded)
    report.versions = {
        name: importlib.metadata.version(name)
        for name in ("pn-compiler", "torch", "onnx", "onnxruntime", "onnxscript")
    }
    return report


def verified_batches(dynamic_batch: bool) -> tuple[int | None, ...]:
    """The batch sizes at which a file is compared; None is that of the example."""
    return VERIFIED_BATCHES if dynamic_batch else (None,)


def _write(proto: onnx.ModelProto, path: Path, staged: Path | None, report: Report) -> None:
    """Puts the verified model in its place: one file, or the pair that lies in the staging folder."""
    report.path = str(path)
    data = staged and data_file(proto, staged)
    if staged is None or data is None:
        content = proto.SerializeToString()
        report.file_bytes = len(content)
        write_atomically(path, content)
        return
    report.file_bytes, report.data_bytes = staged.stat().st_size, data.stat().st_size
    publish([data, staged], path.parent)


def _export_and_verify(
    inputs: Inputs,
    opset_version: int,
    dynamic_batch: bool,
    names: Names,
    staged: Path | None,
    compare: Callable[[onnx.ModelProto], Verification] | None,
    model: nn.Module,
    *,
    report: Report,
    say: Progress,
) -> onnx.ModelProto:
    """The ONNX model of `model`, checked and, by `compare`, verified; the report notes the result."""
    with timed(report, "export", say):
        proto = _export(model, inputs, opset_version, names, dynamic_batch=dynamic_batch, staged=staged)
    with timed(report, "check", say):
        _check(proto, staged)
    if compare is not None:
        with timed(report, "verify", say):
            result = compare(proto)
        report.checks, report.tolerance = result.checks, result.tolerance
        report.float32_error, report.reference = result.float32_error, result.reference
        report.dtype, report.runtime = result.dtype, result.runtime
    return proto


@contextlib.contextmanager
def timed(report: Report, stage: str, say: Progress) -> Iterator[None]:
    """Announces a stage and notes its seconds in the report."""
    say(stage)
    start = time.perf_counter()
    yield
    report.seconds[stage] = report.seconds.get(stage, 0.0) + time.perf_counter() - start


def _check_arguments(path: Path, inputs: Inputs) -> None:
    check_writable(path)
    if not inputs.tensors():
        raise ExportError("example_inputs: expected a tensor or a tuple with tensors")


def _export(
    model: nn.Module,
    inputs: Inputs,
    opset_version: int,
    names: Names,
    *,
    dynamic_batch: bool,
    staged: Path | None,
) -> onnx.ModelProto:
    """The ONNX model that torch.onnx makes, with the IR version of its opset and no traces of source."""
    dynamic_shapes = None
    # torch.export takes a batch of 1 for a constant, and one tensor in two places for one input
    inputs = imitate(inputs, 2 if dynamic_batch else None)
    if inputs.args and isinstance(inputs.args[-1], dict):  # torch.onnx would take it for the keywords
        inputs = Inputs((), inputs.by_name(model))
    if dynamic_batch:
        batch = torch.export.Dim("batch", min=1)
        dynamic_shapes = pytree.tree_map(
            lambda x: {0: batch} if isinstance(x, torch.Tensor) and x.dim() else None, inputs.by_name(model)
        )
    try:
        with _quiet():
            program = torch.onnx.export(
                model.eval(),
                inputs.args,
                kwargs=dict(inputs.kwargs),
                dynamo=True,
                opset_version=opset_version,
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
    except Exception as error:
        hint = "; if the batch axis is the cause, try a static batch" if dynamic_batch else ""
        raise ExportError(f"torch.onnx cannot export the model: {_cause(error)}{hint}") from error
    assert program is not None
    rename(program.model.graph, names)
    if staged is not None:
        move_weights_out(program.model, staged)
    proto: onnx.ModelProto = program.model_proto
    _strip(proto)
    if dynamic_batch:
        _name_batch(proto)
    freeze_reshapes(proto)
    use_depthwise_affines(proto, str(staged.parent) if staged else "")
    proto.ir_version = min(
        proto.ir_version, max(8, onnx.helper.OP_SET_ID_VERSION_MAP[("ai.onnx", opset_version)])
    )
    proto.producer_name = "pn_compiler"
    proto.producer_version = importlib.metadata.version("pn-compiler")
    return proto


def _strip(proto: onnx.ModelProto) -> None:
    """Removes stack traces and module paths, which name files of the machine that compiled."""
    del proto.metadata_props[:]
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]


def _name_batch(proto: onnx.ModelProto) -> None:
    """Calls the batch axis "batch"; torch.onnx names it s31 or the like when several inputs have it."""
    shapes = [value.type.tensor_type.shape for value in proto.graph.input]
    symbols = {shape.dim[0].dim_param for shape in shapes if len(shape.dim)} - {""}
    if not symbols:
        return
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, symbols))})\b")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = symbol.sub("batch", dim.dim_param)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says about itself; its failures are exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """First line of the innermost exception."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _check(proto: onnx.ModelProto, staged: Path | None) -> None:
    """Raises ExportError if `proto`, saved as `staged` if its weights are beside it, is not valid."""
    if staged is not None:
        staged.write_bytes(proto.SerializeToString())
    try:
        onnx.checker.check_model(proto if staged is None else str(staged), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the ONNX checker refuses the model: {error}") from error
    domains = {node.domain for node in proto.graph.node} - {"", "ai.onnx"}
    if domains:
        raise ExportError(f"operators outside the ONNX standard: {', '.join(sorted(domains))}")
