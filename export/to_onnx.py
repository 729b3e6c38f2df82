"""From a PyTorch model to a verified ONNX file for a target."""

import contextlib
import dataclasses
import functools
import gc
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnx_ir
from torch import Tensor, nn

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
from pn_compiler.base.stopwatch import Stopwatch
from pn_compiler.base.versions import versions
from pn_compiler.data.parts import part_hint
from pn_compiler.export.dynamic_axes import DynamicAxes
from pn_compiler.export.exporter import export_graph
from pn_compiler.export.external_data import data_file, needs_external_data
from pn_compiler.export.metadata import Description, describe
from pn_compiler.export.node_names import name_nodes, note_paths, noted_paths
from pn_compiler.export.options import ExportOptions
from pn_compiler.export.report import Report, count_onnx_operators, describe_values
from pn_compiler.export.rewrites.blocked import in_blocked_layout
from pn_compiler.export.rewrites.half import DTYPES, in_half
from pn_compiler.export.rewrites.normalizers import use_two_stage_sums
from pn_compiler.export.targets import CANDIDATES, PORTABLE, TARGETS, Target
from pn_compiler.export.tuning import TuningCache, fingerprint, milliseconds
from pn_compiler.export.verify import Expected, Verification, expect, verify_onnx
from pn_compiler.graph.graph_utils import count_parameters
from pn_compiler.running.inputs import Inputs

logger = logging.getLogger(__name__)

VERIFIED_BATCHES = (1, 3)


@dataclasses.dataclass(frozen=True, slots=True)
class Lowered:
    """An ONNX model that was written for a target, checked and, unless `verification` is None, verified.

    Attributes:
        blocked: how many normalizers are in onnxruntime's blocked layout.
        norms: how the normalizers were lowered, if not as the target has it.
    """

    proto: onnx.ModelProto
    target: Target
    blocked: int
    verification: Verification | None
    norms: str = ""


def write_onnx(
    folded: nn.Module,
    reference: nn.Module | Expected,
    path: Path,
    inputs: Inputs,
    options: ExportOptions | None = None,
    *,
    tolerance: float | None = None,
    stopwatch: Stopwatch | None = None,
    description: Description | None = None,
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
        stopwatch: announces and times the stages.
        description: what the file says about itself, besides versions and a fingerprint of its weights.

    Returns:
        What there is to say of the file.

    Raises:
        ExportError: bad arguments, the exporter fails, or the file cannot be written.
        VerificationError: the ONNX model computes something else.
    """
    _check_arguments(path, inputs)
    path = output_target(path)  # weights beside it are found beside the file, not beside a link to it
    options, stopwatch = options or ExportOptions(), stopwatch or Stopwatch()
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
            with stopwatch("reference"):
                reference = reference_of(reference, inputs, options)
        given = folded
        if options.dtype != "float32":
            folded = in_half(folded, DTYPES[options.dtype])
        if isinstance(reference, Expected):
            if options.dtype != "float32":
                reference = reference.in_dtype(folded, DTYPES[options.dtype])
            compare = functools.partial(verify_onnx, model=reference, tolerance=tolerance, path=staged)
        with stopwatch("export"):
            model = export_graph(folded, inputs, options, staged)
        parameters_after = count_parameters(folded)
        if staged is not None:
            for module in (given, folded):
                module.to("meta")
            gc.collect()  # torch.onnx leaves cycles that hold the weights
        tuning: Mapping[str, float] = {}
        if options.target == "auto":
            assert compare is not None
            target, tuning = _choose_target(model, inputs, options, compare, stopwatch)
        else:
            target = TARGETS[options.target]
        lowered = _lower(model, target, staged, compare, stopwatch)
        with stopwatch("write"):
            describe(lowered.proto, description or Description(), staged)
            sizes = _write(lowered.proto, path, staged)
    return _report(path, options, lowered, tuning, parameters_after, sizes, stopwatch)


def _report(
    path: Path,
    options: ExportOptions,
    lowered: Lowered,
    tuning: Mapping[str, float],
    parameters_after: int,
    sizes: tuple[int, int],
    stopwatch: Stopwatch,
) -> Report:
    proto = lowered.proto
    report = Report(
        path=str(path),
        opset_version=options.opset,
        ir_version=proto.ir_version,
        inputs=describe_values(proto.graph.input),
        outputs=describe_values(proto.graph.output),
        parameters_after=parameters_after,
        operators_after=count_onnx_operators(proto),
        target=lowered.target.name,
        blocked=lowered.blocked,
        tuning=dict(tuning),
        norms=lowered.norms,
        file_bytes=sizes[0],
        data_bytes=sizes[1],
        seconds=stopwatch.seconds,
        versions=versions(),
    )
    if lowered.verification is None:
        return report
    found = lowered.verification
    return dataclasses.replace(
        report,
        checks=found.checks, tolerance=found.tolerance, float32_error=found.float32_error,
        reference=found.reference, dtype=found.dtype, runtime=found.runtime,
    )  # fmt: skip


def reference_of(model: nn.Module, inputs: Inputs, options: ExportOptions) -> Expected:
    """What a file with `options` is compared with: outputs of `model` at each batch size and size of an axis.

    Raises:
        ExportError: `model` does not run on other sizes, which the file should take.
        VerificationError: it does not run at other batch sizes.
    """
    batches = verified_batches(options.dynamic_batch)
    try:
        found = expect(model, inputs, batches)
    except VerificationError as error:
        nested = not all(isinstance(given, Tensor) for given in (*inputs.args, *inputs.kwargs.values()))
        raise VerificationError(f"{error}{part_hint(model) if nested else ''}") from error
    if not options.dynamic_axes:
        return found
    axes = DynamicAxes.of(options.dynamic_axes, model, inputs)
    other = axes.resized(model, inputs)
    resized = dataclasses.replace(expect(model, other, batches[-1:]), sizes=axes.sizes(other))
    return dataclasses.replace(found, resized=resized)


def verified_batches(dynamic_batch: bool) -> tuple[int | None, ...]:
    """The batch sizes at which a file is compared; None is that of the example."""
    return VERIFIED_BATCHES if dynamic_batch else (None,)


def _write(proto: onnx.ModelProto, path: Path, staged: Path | None) -> tuple[int, int]:
    """Puts the verified model in its place: one file, or the pair that lies in the staging folder.

    Returns:
        (bytes of the file, bytes of the weights beside it).
    """
    data = staged and data_file(proto, staged)
    if staged is None or data is None:
        content = proto.SerializeToString()
        write_atomically(path, content)
        return len(content), 0
    staged.write_bytes(proto.SerializeToString())
    sizes = staged.stat().st_size, data.stat().st_size
    publish([data, staged], path.parent)
    return sizes


def _lower(
    model: onnx_ir.Model,
    target: Target,
    staged: Path | None,
    compare: Callable[[onnx.ModelProto], Verification] | None,
    stopwatch: Stopwatch,
) -> Lowered:
    """What torch.onnx gave, written for `target`, checked and, by `compare`, verified.

    Where the normalizers are too far off, their sums are made in two stages. `model` is edited in place.
    """
    with stopwatch("lower"):
        target.lower(model)
    try:
        return _verified(model, target, staged, compare, stopwatch)
    except VerificationError as error:
        if not use_two_stage_sums(model) and not target.blocked:
            raise
        logger.info("%s; trying again with two-stage sums in the normalizers", error)
        exact = dataclasses.replace(target, norms="two-stage")
        try:
            lowered = _verified(model, exact, staged, compare, stopwatch)
        except VerificationError:
            raise
        except ExportError as other:  # of the layout: images one after the other were the only way
            raise ExportError(f"{other} (one image after the other, {error})") from error
        first = "sums of squares" if target.blocked else "InstanceNormalization"
        norms = f"two-stage sums, with {first} the error was too large"
        return dataclasses.replace(lowered, target=target, norms=norms)


def _verified(
    model: onnx_ir.Model,
    target: Target,
    staged: Path | None,
    compare: Callable[[onnx.ModelProto], Verification] | None,
    stopwatch: Stopwatch,
) -> Lowered:
    blocked, verification = 0, None
    with stopwatch("check"):
        proto = onnx_ir.to_proto(model)
        name_nodes(proto, noted_paths(model))
        _check(proto, staged)
    if target.blocked:
        with stopwatch("lay out"):
            proto, blocked = in_blocked_layout(proto, one_image=target.norms != "two-stage")
            name_nodes(proto, noted_paths(model))
    if compare is not None:
        with stopwatch("verify"):
            verification = compare(proto)
    return Lowered(proto, target, blocked, verification)


def _choose_target(
    model: onnx_ir.Model,
    inputs: Inputs,
    options: ExportOptions,
    compare: Callable[[onnx.ModelProto], Verification],
    stopwatch: Stopwatch,
) -> tuple[Target, Mapping[str, float]]:
    """The candidate that is the fastest on this machine, else portable; and milliseconds by candidate.

    They were measured now or earlier; none, if there are none.
    """
    proto = onnx_ir.to_proto(model)
    names = [value.name for value in proto.graph.input]
    feed = dict(zip(names, (tensor.numpy() for tensor in inputs.tensors()), strict=True))
    candidates = {
        target.name: target for target in CANDIDATES if options.dtype == "float32" or not target.blocked
    }
    tuning_cache, key = TuningCache(), fingerprint(proto, feed, options.threads)
    tuning = tuning_cache.get(key) or {}
    if not tuning.keys() & candidates.keys() and options.tune:
        with tempfile.TemporaryDirectory() as folder:
            files: dict[str, Path] = {}
            for name, target in candidates.items():
                try:
                    copy = onnx_ir.from_proto(proto)
                    note_paths(copy, noted_paths(model))
                    candidate = _lower(copy, target, None, compare, Stopwatch(stopwatch.announce)).proto
                except PnCompilerError as error:
                    logger.info("candidate %s is left out: %s", name, error)
                    continue
                files[name] = Path(folder, f"{len(files)}.onnx")
                files[name].write_bytes(candidate.SerializeToString())
            with stopwatch("tune"):
                tuning = milliseconds(files, feed, options.threads, lambda: stopwatch.announce("tune"))
        tuning_cache.put(key, tuning)
    measured = {name: time for name, time in tuning.items() if name in candidates}
    return candidates[min(measured, key=measured.__getitem__)] if measured else PORTABLE, tuning


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
