"""The stages of export_onnx and compile: what each takes, and its result, which nothing changes later."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pn_compiler.base.config import Logits, RecoveryConfig, TargetName, TransformConfig
from pn_compiler.base.diagnostics import Diagnostic, Site
from pn_compiler.base.errors import (
    BatchDependentError,
    ConfigError,
    PnCompilerError,
    VerificationError,
    first_line,
)
from pn_compiler.base.option_checks import check_path
from pn_compiler.base.options import stated
from pn_compiler.base.stopwatch import Stopwatch
from pn_compiler.base.strict_json import to_json
from pn_compiler.base.user_warnings import listed
from pn_compiler.data.input_shape import choose_inputs, stated_inputs
from pn_compiler.freezing.freeze_report import FreezeReport
from pn_compiler.freezing.static_statistics import freeze_statistics
from pn_compiler.graph.graph_module import is_converted, notes, sites
from pn_compiler.graph.graph_utils import count_operators
from pn_compiler.graph.pass_log import stage
from pn_compiler.nn import Normalizer
from pn_compiler.pipeline.conversion import measure_conversion
from pn_compiler.pipeline.fidelity import Fidelity
from pn_compiler.pipeline.folding import fold_in_place
from pn_compiler.recovery.distillation import DistillReport, distill
from pn_compiler.regions.regions import Trace, trace
from pn_compiler.repository.adding import add_to_repository
from pn_compiler.repository.options import ModelRepository
from pn_compiler.running.copying import copy_model
from pn_compiler.running.evaluation import check_values, to_eval_mode
from pn_compiler.running.inputs import Inputs

if TYPE_CHECKING:
    from pn_compiler.export import Description, ExportOptions, Report


@dataclasses.dataclass(frozen=True, slots=True)
class Traced:
    """A trace of a model, and what it is converted and exported with.

    Attributes:
        trace: its graphs are converted in place.
        inputs: arguments of a call.
        input_shape_source: where their shape came from, in words.
        operators: how often each stands in the trace, before it is converted.
    """

    trace: Trace
    inputs: Inputs
    input_shape_source: str
    operators: Mapping[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Recovered:
    """A converted network after what was asked for to get accuracy and speed back, and the reports."""

    model: nn.Module
    distillation: DistillReport | None = None
    static: FreezeReport | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """What is exported, and the results of the stages before that.

    Attributes:
        model: on the CPU, in eval mode. It cannot be used after the export.
        witness: what the file must compute: `model` itself, or what it was copied from.
        inputs: arguments of a call.
        parameters: how many values were trained, before a conversion.
        traced, recovered: None if the model was not converted here.
        fidelity: how far outputs are from those of the model that was converted.
        stages: the options of the stages before the export.
    """

    model: nn.Module
    witness: nn.Module
    inputs: Inputs
    parameters: int
    traced: Traced | None = None
    recovered: Recovered | None = None
    fidelity: Fidelity | None = None
    stages: tuple[TransformConfig | RecoveryConfig, ...] = ()


def trace_model(
    model: nn.Module,
    example: Inputs | None,
    input_shape: tuple[int, ...] | None,
    leaves: Sequence[str | type[nn.Module]],
    stopwatch: Stopwatch,
) -> Traced:
    """Traces `model`, and chooses the inputs that are not given."""
    with stopwatch("trace"):
        traced = trace(model, example, leaves, example=lambda: stated_inputs(model, input_shape))
        operators = count_operators(region.gm for region in traced.regions)
        inputs, source = choose_inputs(model, traced.root, example, input_shape)
    return Traced(traced, inputs, source, operators)


def recover(
    converted: nn.Module,
    teacher: nn.Module,
    calibration: Iterable[Any] | None,
    config: RecoveryConfig,
    stopwatch: Stopwatch,
) -> Recovered:
    """Distills and freezes copies of `converted`, as `config` asks."""
    distillation = static = None
    if config.distill_steps:
        with stopwatch("distill"):
            converted, distillation = distill(
                converted, teacher, calibration,
                steps=config.distill_steps, logits=config.distill_logits, metric=config.metric,
            )  # fmt: skip
    if config.static_statistics is not None:
        budget = config.error_budget if config.static_statistics == "auto" else None
        with stopwatch("freeze"), stage("freeze"):
            converted, static = freeze_statistics(converted, calibration, budget=budget, metric=config.metric)
    return Recovered(converted, distillation, static)


def compare(
    model: nn.Module,
    converted: nn.Module,
    inputs: Inputs,
    calibration: Iterable[Any] | None,
    logits: Logits,
    stopwatch: Stopwatch,
    *,
    trained_on: bool,
) -> Fidelity | None:
    """How far outputs of `converted` are from those of `model`; None if that was converted before."""
    if is_converted(model):
        return None
    with stopwatch("measure"):
        return measure_conversion(model, converted, inputs, calibration, logits, trained_on=trained_on)


def refuse_conversion(config: TransformConfig, recovery: RecoveryConfig) -> None:
    """Raises ConfigError if options ask for another conversion of a model that is converted."""
    if config != TransformConfig(strict=config.strict, metric=config.metric):
        raise ConfigError("the model is already converted: options of transform have no effect")
    if recovery.distill_steps:
        raise ConfigError("the model is already converted: distill it with its BatchNorm network as teacher")
    if recovery.benchmark:
        raise ConfigError("the model is already converted: there is no network with BatchNorm to measure")


def check_destinations(
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


def on_cpu(model: nn.Module, *, share: bool) -> nn.Module:
    """A copy of `model` on the CPU, in eval mode.

    Args:
        model: left untouched.
        share: whether nothing will write to its parameters, so that they need no copy if they are there.

    Raises:
        ConfigError: it has no values.
    """
    check_values(model)
    return to_eval_mode(copy_model(model, share_parameters=share and _is_on_cpu(model)).cpu())


def witness(original: nn.Module, copied: nn.Module) -> nn.Module:
    """What results are compared with: the user's own model, unless it is on another device, then its copy."""
    return original if _is_on_cpu(original) else copied


def _is_on_cpu(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))


def has_sites(model: nn.Module) -> bool:
    return any(isinstance(module, Normalizer) for module in model.modules())


def check_calibration(
    calibration: Iterable[Any] | None, config: TransformConfig, recovery: RecoveryConfig
) -> None:
    """Raises ConfigError if samples are missing, or given for nothing."""
    uses = {
        "anchor='auto'": config.anchor == "auto",
        "warm_start='calibrate'": config.warm_start == "calibrate",
        "distill_steps": recovery.distill_steps > 0,
        "static_statistics": recovery.static_statistics is not None,
    }
    needing = [name for name, used in uses.items() if used]
    if recovery.metric is not None and not {*needing} - {"warm_start='calibrate'"}:
        raise ConfigError("metric has no effect without distill_steps or static_statistics, or anchor='auto'")
    if needing and calibration is None:
        raise ConfigError(f"{needing[0]} needs samples: give calibration=, batches of inputs")
    if calibration is not None and not needing:
        raise ConfigError(f"calibration data are given, and nothing uses them: {', '.join(uses)} would")


def _refuse_varying(model: nn.Module) -> None:
    """Raises VerificationError if outputs of `model` vary from call to call, as its conversion has found."""
    varying = [note for note in notes(model) if note.code == "PN125"] if is_converted(model) else []
    if varying:
        raise VerificationError(
            f"{varying[0]}: a file, which gives the same in each call, cannot be compared with it; "
            "verify=False writes one that was not compared"
        )


def export_network(
    network: Network,
    path: str | os.PathLike[str] | None,
    repository: ModelRepository | None,
    options: "ExportOptions",
    stopwatch: Stopwatch,
) -> "Report":
    """Folds `network` and writes the file, and from it the repository; without `path` the file is temporary.

    Returns:
        The report, from the results of all stages.
    """
    from pn_compiler.export import narrow, reference_of, write_onnx

    model = network.model
    if options.verify:
        _refuse_varying(model)
    remarks = _batch_remarks(network, options)
    reference: Any = model
    if options.verify or repository is not None:
        # before folding, which then needs no second copy of the weights
        with stopwatch("reference"):
            reference = reference_of(network.witness, network.inputs, options)
    if has_sites(model):
        with stopwatch("fold"), stage("fold"):
            model = fold_in_place(model)
    with stopwatch("narrow"), stage("narrow"):
        narrowed = narrow(model, network.inputs, options.target)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if path is None else ""
        file = Path(path or Path(folder, "model.onnx"))
        written = write_onnx(
            model, reference if options.verify else model, file, network.inputs, options,
            stopwatch=stopwatch, description=_description(network, options),
        )  # fmt: skip
        report = _assembled(written, network, model, (*remarks, *narrowed))
        if repository is None:
            return report
        stored = add_to_repository(repository, file, reference, report, options.dtype, stopwatch)
        return stored if path is None else dataclasses.replace(stored, path=str(path))


def _batch_remarks(network: Network, options: "ExportOptions") -> tuple[Diagnostic, ...]:
    """PN310 if outputs depend on the batch. Raises BatchDependentError if that is not allowed."""
    from pn_compiler.export import batch_dependence

    change = batch_dependence(network.model, network.inputs, dynamic_batch=options.dynamic_batch)
    if not change:
        return ()
    skipped = [site for site in _sites(network.model) if site.kind == "skipped" and site.code != "PN103"]
    left = [f"{site.name} ({site.code})" for site in skipped]
    cause = f": {listed(left)} still normalize over the batch" if left else ""
    found = f"the outputs of a sample change by {100 * change:.2g} % with the others in its batch{cause}"
    if not options.allow_batch_dependent:
        raise BatchDependentError(
            f"PN310: {found}; convert what normalizes over the batch, or write the file all the same with "
            "--allow-batch-dependent (allow_batch_dependent=True)"
        )
    return (Diagnostic("PN310", "", found),)


def benchmarked(
    report: "Report", network: Network, original: nn.Module, options: "ExportOptions", stopwatch: Stopwatch
) -> "Report":
    """`report` with the speed of its file beside that of `original`, or with a note why there is none."""
    from pn_compiler.export.benchmark import benchmark

    try:
        found = benchmark(original, Path(report.path), network.inputs, options, stopwatch)
    except PnCompilerError as error:
        note = Diagnostic("PN311", "", f"the network with BatchNorm was not measured: {first_line(error)}")
        return dataclasses.replace(report, notes=(*report.notes, note))
    return dataclasses.replace(report, benchmark=found, seconds=stopwatch.seconds)


def _description(network: Network, options: "ExportOptions") -> "Description":
    """What the file says about itself."""
    from pn_compiler.export import Description

    found = _sites(network.model)
    converted = sum(site.kind != "skipped" for site in found)
    about = {"options": to_json(stated(*network.stages, options))}
    doc = [f"{converted} of {len(found)} BatchNorms became batch-independent normalizers."] if found else []
    if network.fidelity is not None:
        about["fidelity"] = str(network.fidelity)
        doc.append(f"To the original: {network.fidelity}.")
    return Description(" ".join(doc), about)


def _sites(model: nn.Module) -> tuple[Site, ...]:
    return sites(model) if is_converted(model) else ()


def _assembled(
    written: "Report", network: Network, folded: nn.Module, remarks: tuple[Diagnostic, ...]
) -> "Report":
    """The report of all stages.

    Args:
        written: what there is to say of the file.
        folded: the model in the file; its sites say what folding made of them.
        remarks: on the file as a whole.
    """
    report = dataclasses.replace(
        written, parameters_before=network.parameters, fidelity=network.fidelity, notes=remarks
    )
    if network.traced is None or network.recovered is None:
        return report
    return dataclasses.replace(
        report,
        input_shape_source=network.traced.input_shape_source,
        operators_before=dict(network.traced.operators),
        sites=sites(folded),
        notes=(*notes(folded), *remarks),
        distillation=network.recovered.distillation,
        static=network.recovered.static,
    )
