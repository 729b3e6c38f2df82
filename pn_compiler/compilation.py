"""The public functions export_onnx and compile."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from pn_compiler.api import convert_trace
from pn_compiler.base.config import (
    Anchor,
    DType,
    ExportConfig,
    Logits,
    MetricFunction,
    Norm,
    ProxyPadding,
    RecoveryConfig,
    StaticStatistics,
    TargetName,
    TransformConfig,
    WarmStart,
)
from pn_compiler.base.errors import ExportError
from pn_compiler.base.option_checks import check_function
from pn_compiler.base.options import pick
from pn_compiler.base.stopwatch import Stopwatch
from pn_compiler.graph.graph_module import is_converted, notes, record, sites
from pn_compiler.graph.graph_utils import count_parameters
from pn_compiler.graph.pass_base import Progress
from pn_compiler.graph.pass_log import pass_log, summed
from pn_compiler.pipeline.conversion import first_sample
from pn_compiler.repository.options import ModelRepository
from pn_compiler.running.copying import unwrap
from pn_compiler.running.evaluation import batches_of, check_dense
from pn_compiler.running.inputs import Inputs
from pn_compiler.stages import (
    Network,
    benchmarked,
    check_calibration,
    check_destinations,
    compare,
    export_network,
    has_sites,
    on_cpu,
    recover,
    refuse_conversion,
    trace_model,
    witness,
)

if TYPE_CHECKING:
    from pn_compiler.export import Report


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str] | None,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    target: TargetName = ExportConfig.target,
    tune: bool = ExportConfig.tune,
    threads: int | None = ExportConfig.threads,
    opset_version: int | None = ExportConfig.opset_version,
    target_ort: str | None = ExportConfig.target_ort,
    dynamic_batch: bool = ExportConfig.dynamic_batch,
    dynamic_axes: Sequence[str] | Mapping[str, Mapping[int, str]] = ExportConfig.dynamic_axes,
    external_data: bool = ExportConfig.external_data,
    dtype: DType = ExportConfig.dtype,
    input_names: Sequence[str] = ExportConfig.input_names,
    output_names: Sequence[str] = ExportConfig.output_names,
    repository: ModelRepository | None = None,
    verify: bool = ExportConfig.verify,
    allow_batch_dependent: bool = ExportConfig.allow_batch_dependent,
    progress: Progress | None = None,
) -> "Report":
    """Folds `model` if it holds sites, exports it to ONNX and compares the two.

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
        threads: of onnxruntime, where the file is measured: by default one for each core.
        opset_version: ONNX operator set, 18 to 24. The default, 20 with IR version 9, is loaded by
            onnxruntime 1.17 and later.
        target_ort: an onnxruntime such as "1.18" that must load the file.
        dynamic_batch: whether the file takes any batch size, or only that of the example.
        dynamic_axes: sizes that may vary besides it: letters such as ("H", "W") of images [N, C, H, W] ("D"
            of volumes, "L" of sequences), or axes of parameters of forward, {"x": {2: "height"}}. Equal names
            have equal sizes. The file is verified at the sizes of the example and at others.
        external_data: write the weights to ``<path>.data``. Above 2 GB this is done in any case.
        dtype: of weights and activations: "float32", "float16" or "bfloat16" (opset 22 or later). Inputs,
            outputs and normalizers stay float32: see docs/precision.md.
        input_names: of the inputs in the file. Default: as the parameters of forward.
        output_names: of the outputs in the file. Default: "output", or "output_0" and so on.
        repository: where the model is written for servers, too: see `export_model_repository`.
        verify: compare the file, in onnxruntime with optimizations off and on, at batch 1 and 3, with
            `model` in float64. The error relative to the largest output may be 1e-4, or four times that of
            PyTorch in float32 where this is more, but 1e-2 at most; the report states it.
        allow_batch_dependent: write the file even if the outputs of a sample depend on the others in its
            batch, as they do where a BatchNorm without running statistics is left; the report has PN310 then.
        progress: called with the name of each stage.

    Returns:
        The report; ``str`` of it is for people, ``to_json()`` for machines.

    Raises:
        BatchDependentError: outputs depend on the batch, and `allow_batch_dependent` is not set.
        ExportError: the model cannot be exported, or the file not written.
        VerificationError: the ONNX model computes something else; there is no file then.
    """
    arguments = locals()
    from pn_compiler.export import ExportOptions  # onnx only when it is needed

    options = pick(ExportOptions, arguments)
    check_function("progress", progress)
    check_destinations(path, repository, target)
    inputs = Inputs.of(example_inputs, example_kwargs) or Inputs()
    if not inputs.tensors():
        raise ExportError(
            "example_inputs: expected a tensor or a tuple with tensors, what forward is called with"
        )
    check_dense(inputs, "example_inputs")
    model = unwrap(model)
    copied = on_cpu(model, share=not has_sites(model))
    network = Network(copied, witness(model, copied), inputs, count_parameters(model))
    return export_network(network, path, repository, options, Stopwatch(progress))


def compile(  # noqa: A001  # the name that users of torch.compile look for
    model: nn.Module,
    path: str | os.PathLike[str] | None,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    norm: Norm | None = TransformConfig.norm,
    num_groups: int | None = TransformConfig.num_groups,
    anchor: Anchor | None = TransformConfig.anchor,
    anchor_budget: float = TransformConfig.anchor_budget,
    proxy: bool = TransformConfig.proxy,
    proxy_padding: ProxyPadding = TransformConfig.proxy_padding,
    warm_start: WarmStart = TransformConfig.warm_start,
    calibration: Iterable[Any] | None = None,
    distill_steps: int = RecoveryConfig.distill_steps,
    distill_logits: Logits = RecoveryConfig.distill_logits,
    static_statistics: StaticStatistics | None = RecoveryConfig.static_statistics,
    error_budget: float = RecoveryConfig.error_budget,
    metric: str | MetricFunction | None = RecoveryConfig.metric,
    benchmark: bool = RecoveryConfig.benchmark,
    strict: bool = TransformConfig.strict,
    leaves: Sequence[str | type[nn.Module]] = TransformConfig.leaves,
    target: TargetName = ExportConfig.target,
    tune: bool = ExportConfig.tune,
    threads: int | None = ExportConfig.threads,
    opset_version: int | None = ExportConfig.opset_version,
    target_ort: str | None = ExportConfig.target_ort,
    dynamic_batch: bool = ExportConfig.dynamic_batch,
    dynamic_axes: Sequence[str] | Mapping[str, Mapping[int, str]] = ExportConfig.dynamic_axes,
    external_data: bool = ExportConfig.external_data,
    dtype: DType = ExportConfig.dtype,
    input_names: Sequence[str] = ExportConfig.input_names,
    output_names: Sequence[str] = ExportConfig.output_names,
    repository: ModelRepository | None = None,
    verify: bool = ExportConfig.verify,
    allow_batch_dependent: bool = ExportConfig.allow_batch_dependent,
    progress: Progress | None = None,
) -> "Report":
    """From a trained BatchNorm network to a verified batch-independent ONNX file, in one call.

    Transforms `model` (unless it is converted already), distills if asked to, folds, exports and verifies:
    see `transform`, `distill`, `fold` and `export_onnx` for the options.

    Args:
        model: left untouched; compiled as in eval mode.
        path: the ONNX file; None if only a repository is wanted.
        example_inputs: arguments of a call by position, as for `transform`.
        example_kwargs: arguments of that call by name.
        repository: where the model is written for Triton and MLServer, too: see `export_model_repository`.
        calibration: samples for anchor="auto", warm_start="calibrate", `distill_steps` and
            `static_statistics`.
        distill_steps: steps of `distill` towards the outputs of `model`; 0 leaves it out.
        distill_logits: its `logits`; "all" for a segmentation network.
        static_statistics: replace instance statistics by constants, which changes results: "auto" as many as
            keep the error within `error_budget`, "all" whatever it is; None leaves them. See
            `freeze_statistics`. The file is then compared with the network that has the constants.
        error_budget: of the output, relative; with `metric` what that may lose, in its own units.
        metric: the `metric` of anchor="auto", `distill` and `freeze_statistics`; `calibration` has labels
            then.
        benchmark: measure the file, in onnxruntime, beside that of `model` with its BatchNorms.
        input_shape: shape of a single float input, batch included, instead of `example_inputs`. Without
            either the shape is guessed from the first layer, and the report says so.

    Returns:
        The report, with the table of sites.

    Raises:
        ConfigError: an impossible option, or an input shape that is missing or does not fit.
        Others: as `transform` and `export_onnx`.
    """
    arguments = locals()
    from pn_compiler.export import ExportOptions

    options = pick(ExportOptions, arguments)
    config, recovery = pick(TransformConfig, arguments), pick(RecoveryConfig, arguments)
    check_function("progress", progress)
    check_destinations(path, repository, target)
    original, stopwatch = unwrap(model), Stopwatch(progress)
    model = on_cpu(original, share=True)
    if is_converted(model):
        refuse_conversion(config, recovery)
    check_calibration(calibration, config, recovery)
    example = Inputs.of(example_inputs, example_kwargs)
    check_dense(example or Inputs(), "example_inputs")
    if calibration is not None:
        calibration = batches_of(calibration, again=True)
        example = example if example or input_shape else first_sample(calibration, model)
    with pass_log() as runs:
        traced = trace_model(model, example, input_shape, leaves, stopwatch)
        if is_converted(model):
            record(traced.trace.root, sites(model), notes(model))
        else:
            convert_trace(
                traced.trace, model, witness(original, model), traced.inputs, calibration, config, stopwatch
            )
        recovered = recover(traced.trace.root, model, calibration, recovery, stopwatch)
        fidelity = compare(
            model, recovered.model, traced.inputs, calibration, distill_logits, stopwatch,
            trained_on=recovered.distillation is not None,
        )  # fmt: skip
        network = Network(
            recovered.model, recovered.model, traced.inputs, count_parameters(original),
            traced=traced, recovered=recovered, fidelity=fidelity, stages=(config, recovery),
        )  # fmt: skip
        report = export_network(network, path, repository, options, stopwatch)
    report = dataclasses.replace(report, passes=tuple(summed(runs)))
    return benchmarked(report, network, model, options, stopwatch) if recovery.benchmark else report
