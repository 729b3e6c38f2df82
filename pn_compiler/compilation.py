"""The public functions export_onnx and compile."""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pn_compiler.base.config import (
    DType,
    ExportConfig,
    Logits,
    Norm,
    ProxyPadding,
    RecoveryConfig,
    StaticStatistics,
    TargetName,
    TransformConfig,
    WarmStart,
)
from pn_compiler.base.errors import ConfigError, ExportError, VerificationError
from pn_compiler.base.option_checks import check_function, check_path
from pn_compiler.base.options import pick
from pn_compiler.data.input_shape import choose_inputs, stated_inputs
from pn_compiler.graph.graph_module import is_converted, notes, record, sites
from pn_compiler.graph.graph_utils import count_operators, count_parameters
from pn_compiler.graph.pass_base import Progress
from pn_compiler.nn import ProxyNormAct
from pn_compiler.pipeline.conversion import convert, first_sample, measure_conversion, prepare
from pn_compiler.pipeline.folding import fold_in_place
from pn_compiler.recovery.calibration import calibrate_prepared
from pn_compiler.recovery.distillation import distill
from pn_compiler.recovery.static_statistics import freeze_statistics
from pn_compiler.regions.regions import trace
from pn_compiler.repository.adding import add_to_repository
from pn_compiler.repository.options import ModelRepository
from pn_compiler.running.copying import copy_model, unwrap
from pn_compiler.running.evaluation import batches_of, check_dense, check_values, to_eval_mode
from pn_compiler.running.inputs import Inputs

if TYPE_CHECKING:
    from pn_compiler.export import ExportOptions, Report


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str] | None,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    target: TargetName = ExportConfig.target,
    tune: bool = ExportConfig.tune,
    opset_version: int | None = ExportConfig.opset_version,
    target_ort: str | None = ExportConfig.target_ort,
    dynamic_batch: bool = ExportConfig.dynamic_batch,
    external_data: bool = ExportConfig.external_data,
    dtype: DType = ExportConfig.dtype,
    input_names: Sequence[str] = ExportConfig.input_names,
    output_names: Sequence[str] = ExportConfig.output_names,
    repository: ModelRepository | None = None,
    verify: bool = ExportConfig.verify,
    progress: Progress | None = None,
) -> "Report":
    """Folds `model` if it holds proxy normalization, exports it to ONNX and compares the two.

    Args:
        model: a result of `transform` or `fold`, or any other module. It is left untouched.
        path: the ONNX file, written whole or not at all; None if only a repository is wanted.
        example_inputs: a tensor, or a tuple of tensors and nested tuples, lists and dicts of them; the
            first axis is the batch.
        example_kwargs: arguments that are given by name.
        target: what the file is for: "portable" (any runtime), "ort-cpu" (onnxruntime on CPUs like this
            one), "openvino", "cuda", "tensorrt", or "auto": what was measured to be the fastest in
            onnxruntime on this machine, "portable" if nothing was. See docs/latency.md.
        tune: measure it for target="auto", unless the cache has the same network on the same machine.
        opset_version: ONNX operator set, 18 to 24. The default, 20 with IR version 9, is loaded by
            onnxruntime 1.17 and later; "openvino" and "tensorrt" have 21.
        target_ort: an onnxruntime such as "1.18" that must load the file.
        dynamic_batch: whether the file takes any batch size, or only that of the example.
        external_data: write the weights to ``<path>.data``. Above 2 GB this is done in any case.
        dtype: of weights and activations: "float32", "float16" or "bfloat16" (opset 22 or later). Inputs,
            outputs and normalizers stay float32: see docs/precision.md.
        input_names, output_names: in the file. Default: as the parameters of forward; "output", or "output_0"
            and so on.
        repository: where the model is written for servers, too: see `export_model_repository`.
        verify: compare the file, in onnxruntime with optimizations off and on, at batch 1 and 3, with
            `model` in float64. The error relative to the largest output may be 1e-4, or four times that of
            PyTorch in float32 where this is more, but 1e-2 at most; the report states it.
        progress: called with the name of each stage.

    Returns:
        The report; ``str`` of it is for people, ``to_json()`` for machines.

    Raises:
        ExportError: the model cannot be exported, or the file not written.
        VerificationError: the ONNX model computes something else; there is no file then.
    """
    arguments = locals()
    from pn_compiler.export import ExportOptions, Report  # onnx only when it is needed

    options = pick(ExportOptions, arguments)
    check_function("progress", progress)
    _check_destinations(path, repository, target)
    inputs = Inputs.of(example_inputs, example_kwargs) or Inputs()
    if not inputs.tensors():
        raise ExportError(
            "example_inputs: expected a tensor or a tuple with tensors, what forward is called with"
        )
    check_dense(inputs, "example_inputs")
    model = unwrap(model)
    report = Report(parameters_before=count_parameters(model))
    copied = _on_cpu(model, share=not _has_sites(model))
    return _export(copied, _witness(model, copied), path, repository, inputs, options, report, progress)


def compile(  # noqa: A001  # the name that users of torch.compile look for
    model: nn.Module,
    path: str | os.PathLike[str] | None,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    norm: Norm = TransformConfig.norm,
    num_groups: int | None = TransformConfig.num_groups,
    proxy: bool = TransformConfig.proxy,
    proxy_padding: ProxyPadding = TransformConfig.proxy_padding,
    warm_start: WarmStart = TransformConfig.warm_start,
    calibration: Iterable[Any] | None = None,
    distill_steps: int = RecoveryConfig.distill_steps,
    distill_logits: Logits = RecoveryConfig.distill_logits,
    static_statistics: StaticStatistics | None = RecoveryConfig.static_statistics,
    error_budget: float = RecoveryConfig.error_budget,
    strict: bool = TransformConfig.strict,
    leaves: Sequence[str | type[nn.Module]] = TransformConfig.leaves,
    target: TargetName = ExportConfig.target,
    tune: bool = ExportConfig.tune,
    opset_version: int | None = ExportConfig.opset_version,
    target_ort: str | None = ExportConfig.target_ort,
    dynamic_batch: bool = ExportConfig.dynamic_batch,
    external_data: bool = ExportConfig.external_data,
    dtype: DType = ExportConfig.dtype,
    input_names: Sequence[str] = ExportConfig.input_names,
    output_names: Sequence[str] = ExportConfig.output_names,
    repository: ModelRepository | None = None,
    verify: bool = ExportConfig.verify,
    progress: Progress | None = None,
) -> "Report":
    """From a trained BatchNorm network to a verified batch-independent ONNX file, in one call.

    Transforms `model` (unless it is converted already), distills if asked to, folds, exports and verifies:
    see `transform`, `distill`, `fold` and `export_onnx` for the options.

    Args:
        model: left untouched; compiled as in eval mode.
        path: the ONNX file; None if only a repository is wanted.
        example_inputs, example_kwargs: arguments of a call, as for `transform`.
        repository: where the model is written for Triton and MLServer, too: see `export_model_repository`.
        calibration: samples for warm_start="calibrate", `distill_steps` and `static_statistics`.
        distill_steps: steps of `distill` towards the outputs of `model`; 0 leaves it out.
        distill_logits: its `logits`; "all" for a segmentation network.
        static_statistics: replace instance statistics by constants, which changes results: "auto" as many as
            keep the error within `error_budget`, "all" whatever it is; None leaves them. See
            `freeze_statistics`. The file is then compared with the network that has the constants.
        error_budget: of the output, relative.
        input_shape: shape of a single float input, batch included, instead of `example_inputs`. Without
            either the shape is guessed from the first layer, and the report says so.

    Returns:
        The report, with the table of sites.

    Raises:
        ConfigError: an impossible option, or an input shape that is missing or does not fit.
        Others: as `transform` and `export_onnx`.
    """
    arguments = locals()
    from pn_compiler.export import ExportOptions, Report, timed

    options = pick(ExportOptions, arguments)
    config, recovery = pick(TransformConfig, arguments), pick(RecoveryConfig, arguments)
    check_function("progress", progress)
    _check_destinations(path, repository, target)
    original = unwrap(model)
    model = _on_cpu(original, share=True)
    if is_converted(model) and config != TransformConfig(strict=strict):
        raise ConfigError("the model is already converted: options of transform have no effect")
    if is_converted(model) and distill_steps:
        raise ConfigError("the model is already converted: distill it with its BatchNorm network as teacher")
    _check_calibration(calibration, config, recovery)
    report = Report(parameters_before=count_parameters(model))
    say = progress or (lambda stage: None)
    given = Inputs.of(example_inputs, example_kwargs)
    check_dense(given or Inputs(), "example_inputs")
    if calibration is not None:
        calibration = batches_of(calibration, again=True)
        given = given if given or input_shape else first_sample(calibration)
    with timed(report, "trace", say):
        traced = trace(model, given, leaves, example=lambda: stated_inputs(model, input_shape))
        report.operators_before = count_operators(region.gm for region in traced.regions)
        inputs, report.input_shape_source = choose_inputs(model, traced.root, given, input_shape)
    if is_converted(model):
        record(traced.root, sites(model), notes(model))
    else:
        with timed(report, "prepare", say):
            prepare(traced, _witness(original, model), inputs, say)
        calibrated = None
        if config.warm_start == "calibrate":
            with timed(report, "calibrate", say):
                calibrated = calibrate_prepared(traced, model, config, calibration)
        with timed(report, "transform", say):
            convert(traced, model, config, calibrated, strict=strict, progress=say)
    converted = traced.root
    if distill_steps:
        with timed(report, "distill", say):
            converted, report.distillation = distill(
                converted, model, calibration, steps=distill_steps, logits=distill_logits
            )
    if static_statistics is not None:
        budget = error_budget if static_statistics == "auto" else None
        with timed(report, "freeze", say):
            converted, report.static = freeze_statistics(converted, calibration, budget=budget)
    if not is_converted(model):
        with timed(report, "measure", say):
            report.fidelity = measure_conversion(model, converted, inputs, calibration, distill_logits)
    report.sites, report.notes = sites(converted), notes(converted)
    return _export(converted, converted, path, repository, inputs, options, report, say)


def _check_destinations(
    path: str | os.PathLike[str] | None, repository: ModelRepository | None, target: TargetName
) -> None:
    """Raises ConfigError if nothing is to be written, ExportError if it cannot be."""
    from pn_compiler.base.files import check_writable
    from pn_compiler.repository.writing import check_repository

    if path is None and repository is None:
        raise ConfigError("nothing would be written: give a path or a repository")
    if path is not None:
        check_path("path", path)
        check_writable(Path(path))
    if repository is not None:
        if not isinstance(repository, ModelRepository):
            raise ConfigError(f"repository={repository!r:.80}: expected a pn_compiler.ModelRepository")
        if target in ("ort-cpu", "auto"):
            raise ConfigError(
                f"target {target} may give a file for this kind of CPU only, and servers load a model "
                "repository anywhere: leave it out"
            )
        check_repository(repository)


def _on_cpu(model: nn.Module, *, share: bool) -> nn.Module:
    """A copy of `model` on the CPU, in eval mode.

    Args:
        model: left untouched.
        share: whether nothing will write to its parameters, so that they need no copy if they are there.

    Raises:
        ConfigError: it has no values.
    """
    check_values(model)
    return to_eval_mode(copy_model(model, share_parameters=share and _is_on_cpu(model)).cpu())


def _witness(original: nn.Module, copied: nn.Module) -> nn.Module:
    """What results are compared with: the user's own model, unless it is on another device, then its copy."""
    return original if _is_on_cpu(original) else copied


def _is_on_cpu(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))


def _has_sites(model: nn.Module) -> bool:
    return any(isinstance(module, ProxyNormAct) for module in model.modules())


def _check_calibration(
    calibration: Iterable[Any] | None, config: TransformConfig, recovery: RecoveryConfig
) -> None:
    """Raises ConfigError if samples are missing, or given for nothing."""
    uses = {
        "warm_start='calibrate'": config.warm_start == "calibrate",
        "distill_steps": recovery.distill_steps > 0,
        "static_statistics": recovery.static_statistics is not None,
    }
    wanted = [name for name, used in uses.items() if used]
    if wanted and calibration is None:
        raise ConfigError(f"{wanted[0]} needs samples: give calibration=, batches of inputs")
    if calibration is not None and not wanted:
        raise ConfigError(f"calibration data are given, and nothing uses them: {', '.join(uses)} would")


def _refuse_varying(model: nn.Module) -> None:
    """Raises VerificationError if outputs of `model` vary from call to call, as its conversion has found."""
    varying = [note for note in notes(model) if note.code == "PN125"] if is_converted(model) else []
    if varying:
        raise VerificationError(
            f"{varying[0]}: a file, which gives the same in each call, cannot be compared with it; "
            "verify=False writes one that was not compared"
        )


def _export(
    model: nn.Module,
    witness: nn.Module,
    path: str | os.PathLike[str] | None,
    repository: ModelRepository | None,
    inputs: Inputs,
    options: "ExportOptions",
    report: "Report",
    progress: Progress | None,
) -> "Report":
    """Folds `model`, which cannot be used afterwards, and writes the file, and from it the repository.

    The file must compute what `witness` does: `model` itself, or what it was copied from. Without `path`
    the file is a temporary one.
    """
    from pn_compiler.export import expect, timed, verified_batches, write_onnx

    say = progress or (lambda stage: None)
    if options.verify:
        _refuse_varying(model)
    reference: Any = model
    if options.verify or repository is not None:
        # before folding, which then needs no second copy of the weights
        with timed(report, "reference", say):
            reference = expect(witness, inputs, verified_batches(options.dynamic_batch))
    if _has_sites(model):
        with timed(report, "fold", say):
            model = fold_in_place(model)
        report.sites = sites(model) if report.sites else ()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if path is None else ""
        file = Path(path or Path(folder, "model.onnx"))
        write_onnx(
            model, reference if options.verify else model, file, inputs, options, report=report,
            progress=progress,
        )  # fmt: skip
        if repository is not None:
            add_to_repository(repository, file, reference, report, options.dtype, progress)
            report.path = str(path or report.path)
    return report
