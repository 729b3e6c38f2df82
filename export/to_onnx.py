"""From a PyTorch model to a verified ONNX file for a target."""

import contextlib
import functools
import gc
import importlib.metadata
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnx_ir
from torch import nn

from pn_compiler.base.errors import ExportError, PnCompilerError, VerificationError
from pn_compiler.base.files import (
    check_plain,
    check_unicode,
    check_writable,
    output_target,
    publish,
    staging_folder,
    write_atomically,
)
from pn_compiler.export.exporter import export_graph
from pn_compiler.export.external_data import data_file, needs_external_data
from pn_compiler.export.options import ExportOptions
from pn_compiler.export.report import Report, count_onnx_operators, describe_values
from pn_compiler.export.rewrites.blocked import in_blocked_layout
from pn_compiler.export.rewrites.half import DTYPES, in_half
from pn_compiler.export.rewrites.normalizers import use_two_stage_sums
from pn_compiler.export.targets import CANDIDATES, PORTABLE, TARGETS, Target
from pn_compiler.export.tuning import Memory, fingerprint, milliseconds
from pn_compiler.export.verify import Expected, Verification, expect, verify_onnx
from pn_compiler.graph.graph_utils import count_parameters
from pn_compiler.graph.pass_base import Progress
from pn_compiler.running.inputs import Inputs

logger = logging.getLogger(__name__)

VERIFIED_BATCHES = (1, 3)


def write_onnx(
    folded: nn.Module,
    reference: nn.Module | Expected,
    path: Path,
    inputs: Inputs,
    options: ExportOptions | None = None,
    *,
    tolerance: float | None = None,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Report:
    """Exports `folded` to `path`, after comparing the result with `reference`.

    Args:
        folded: what is exported, in eval mode. If its weights go to a file of their own, it has none
            afterwards: onnxruntime takes as much memory again.
        reference: what it is compared with: the model in eval mode, or what `expect` gave for it.
        path: written whole or not at all, at the very end.
        inputs: arguments of a call; the first axis of each tensor is the batch.
        options: the defaults, if not given.
        tolerance: largest relative error; see `pn_compiler.export.verify`.
        report: filled in, if given.
        progress: told the name of each stage.

    Raises:
        ExportError: bad arguments, the exporter fails, or the file cannot be written.
        VerificationError: the ONNX model computes something else.
    """
    _check_arguments(path, inputs)
    path = output_target(path)  # weights beside it are found beside the file, not beside a link to it
    options = options or ExportOptions()
    report = Report() if report is None else report
    say = progress or (lambda stage: None)
    with contextlib.ExitStack() as stack:
        staged = None
        if options.external_data or needs_external_data(folded):
            if options.target in ("ort-cpu", "auto"):
                raise ExportError(f"target {options.target} writes one file, of 2 GB at most: use portable")
            check_unicode(path)
            check_plain(path.parent / f"{path.name}.data")
            staged = stack.enter_context(staging_folder(path)) / path.name
        compare = None
        if options.verify and not isinstance(reference, Expected):
            with timed(report, "reference", say):
                reference = expect(reference, inputs, verified_batches(options.dynamic_batch))
        given = folded
        if options.dtype != "float32":
            folded = in_half(folded, DTYPES[options.dtype])
        if isinstance(reference, Expected):
            if options.dtype != "float32":
                reference = reference.in_dtype(folded, DTYPES[options.dtype])
            compare = functools.partial(verify_onnx, model=reference, tolerance=tolerance, path=staged)
        with timed(report, "export", say):
            model = export_graph(folded, inputs, options, staged)
        report.parameters_after = count_parameters(folded)
        if staged is not None:
            for module in (given, folded):
                module.to("meta")
            gc.collect()  # torch.onnx leaves cycles that hold the weights
        if options.target == "auto":
            assert compare is not None
            target = _choose_target(model, inputs, options, compare, report, say)
        else:
            target = TARGETS[options.target]
        report.target = target.name
        proto = _finish(model, target, staged, compare, report, say)
        with timed(report, "write", say):
            _write(proto, path, staged, report)
    report.opset_version, report.ir_version = options.opset_version, proto.ir_version
    report.inputs = describe_values(proto.graph.input)
    report.outputs = describe_values(proto.graph.output)
    report.operators_after = count_onnx_operators(proto)
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


def _finish(
    model: onnx_ir.Model,
    target: Target,
    staged: Path | None,
    compare: Callable[[onnx.ModelProto], Verification] | None,
    report: Report,
    say: Progress,
) -> onnx.ModelProto:
    """What torch.onnx gave, written for `target`, checked and, by `compare`, verified.

    Where the normalizers are too far off, their sums are made in two stages. `model` is edited in place;
    the report notes the result.
    """
    with timed(report, "lower", say):
        target.lower(model)
    try:
        return _verified(model, target, staged, compare, report, say)
    except VerificationError as error:
        if not use_two_stage_sums(model):
            raise
        logger.info("%s; trying again with two-stage sums in the normalizers", error)
        report.norms = "two-stage sums, for InstanceNormalization was too far off"
        return _verified(model, target, staged, compare, report, say)


def _verified(
    model: onnx_ir.Model,
    target: Target,
    staged: Path | None,
    compare: Callable[[onnx.ModelProto], Verification] | None,
    report: Report,
    say: Progress,
) -> onnx.ModelProto:
    with timed(report, "check", say):
        proto = onnx_ir.to_proto(model)
        _check(proto, staged)
    if target.blocked:
        with timed(report, "lay out", say):
            proto, report.blocked = in_blocked_layout(proto)
    if compare is not None:
        with timed(report, "verify", say):
            result = compare(proto)
        report.checks, report.tolerance = result.checks, result.tolerance
        report.float32_error, report.reference = result.float32_error, result.reference
        report.dtype, report.runtime = result.dtype, result.runtime
    return proto


def _choose_target(
    model: onnx_ir.Model,
    inputs: Inputs,
    options: ExportOptions,
    compare: Callable[[onnx.ModelProto], Verification],
    report: Report,
    say: Progress,
) -> Target:
    """The candidate that is the fastest on this machine, as measured now or earlier; else portable."""
    proto = onnx_ir.to_proto(model)
    names = [value.name for value in proto.graph.input]
    feed = dict(zip(names, (tensor.numpy() for tensor in inputs.tensors()), strict=True))
    candidates = {
        target.name: target for target in CANDIDATES if options.dtype == "float32" or not target.blocked
    }
    memory, key = Memory(), fingerprint(proto, feed)
    report.tuning = memory.recall(key) or {}
    if not report.tuning.keys() & candidates.keys() and options.tune:
        with tempfile.TemporaryDirectory() as folder:
            files: dict[str, Path] = {}
            for name, target in candidates.items():
                try:
                    copy = onnx_ir.from_proto(proto)
                    candidate = _finish(copy, target, None, compare, Report(), say)
                except PnCompilerError as error:
                    logger.info("candidate %s is left out: %s", name, error)
                    continue
                files[name] = Path(folder, f"{len(files)}.onnx")
                files[name].write_bytes(candidate.SerializeToString())
            with timed(report, "tune", say):
                report.tuning = milliseconds(files, feed, lambda: say("tune"))
        memory.keep(key, report.tuning)
    measured = {name: time for name, time in report.tuning.items() if name in candidates}
    return candidates[min(measured, key=measured.__getitem__)] if measured else PORTABLE


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
