"""The steps of a conversion: prepare a trace, compare it with the model, convert it, measure the result."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from pn_compiler.base.config import TransformConfig
from pn_compiler.base.diagnostics import Diagnostic, Site
from pn_compiler.base.errors import ConfigError, RefusedError, TraceError
from pn_compiler.graph.graph_module import notes, record, sites
from pn_compiler.graph.pass_base import GraphPass, Progress, run_pipeline
from pn_compiler.graph.ranks import infer_ranks, record_pixels
from pn_compiler.graph.site_table import take_sites
from pn_compiler.graph.warm_start import Calibrated
from pn_compiler.inspection.fake_tensors import has_values
from pn_compiler.passes import PipelineEdit, conversion_pipeline, edited, preparation_pipeline
from pn_compiler.pipeline.equivalence import (
    ChaoticOutputsError,
    NoValuesError,
    VaryingOutputsError,
    check_equivalent,
)
from pn_compiler.pipeline.fidelity import Fidelity, measure
from pn_compiler.regions.accounting import account, shared_with_whole
from pn_compiler.regions.regions import Region, Trace, drop_dead_norm_calls
from pn_compiler.running.evaluation import check_dense, inputs_of
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.losses import Logits

logger = logging.getLogger(__name__)


def first_sample(batches: Iterable[Any], model: nn.Module) -> Inputs:
    """The first sample of `batches` for `model`, as a batch of one. Raises ConfigError if there is none."""
    first = next(iter(batches), None)
    if first is None:
        raise ConfigError("there is no batch for the calibration: batches is empty")
    inputs = inputs_of(first, model)
    check_dense(inputs, "the first batch for the calibration")
    return inputs.map(lambda x: x[:1] if x.dim() else x)


def prepare(
    traced: Trace,
    model: nn.Module,
    inputs: Inputs | None,
    progress: Progress | None = None,
    passes: Sequence[GraphPass] | None = None,
) -> None:
    """Makes every BatchNorm and activation of `traced` a plain module, and compares it with `model`.

    Args:
        traced: a trace of `model`, or of a copy; changed in place.
        model: the network as the user brought it; left as it was.
        inputs: arguments of a call. Without them nothing can be compared, and the notes say so.
        passes: in the place of `preparation_pipeline`.

    Raises:
        ConfigError: the model does not run on `inputs`.
        TraceError: the trace computes something else.
    """
    for region in traced.regions:
        _infer_shapes(region, inputs)
        run_pipeline(preparation_pipeline() if passes is None else passes, region.gm, progress)
    drop_dead_norm_calls(traced)
    reason = _why_not_compared(model, inputs)
    if inputs is not None and not reason:
        reason = _compare(traced, model, inputs)
    if reason:
        traced.notes.append(Diagnostic("PN211", "", *reason))


def _compare(traced: Trace, model: nn.Module, inputs: Inputs) -> tuple[str, str] | None:
    """Raises TraceError if `traced` differs from `model`; else as `_why_not_compared`."""
    branches = any(note.code == "PN110" for note in traced.notes)
    own_modes = branches and traced.root.training
    try:
        check_equivalent(model, traced.root, inputs, own_modes=own_modes)
    except VaryingOutputsError as error:
        _note_varying(traced, error)
    except ChaoticOutputsError as error:
        return str(error), "compare the outputs yourself"
    except NoValuesError as error:
        return str(error), "give an example for which there are some"
    except ConfigError as error:
        if own_modes:  # the branch that was traced runs in train mode only
            return str(error), "give an example that runs in train mode, such as a batch of two"
        raise
    return None


def _note_varying(traced: Trace, error: VaryingOutputsError) -> None:
    """Raises TraceError if what varies was traced: the graph would repeat one of its outputs forever."""
    path = error.path
    if path in traced.entered:
        keep = f"leaves=[{path!r}] (--leaf {path}) keeps it as it is" if path else "rewrite that part of it"
        raise TraceError(f"{error}: it counts or reads a clock, say, and a graph would not; {keep}")
    traced.notes.append(Diagnostic("PN125", path, str(error), "make it depend on its inputs alone"))


def _why_not_compared(model: nn.Module, inputs: Inputs | None) -> tuple[str, str] | None:
    """(why the graph cannot be compared with the model, what to do), or None if it can."""
    if inputs is None:
        return "nothing is known to run the model on", "pass example_inputs"
    if not all(map(has_values, (*model.parameters(), *model.buffers(), *inputs.tensors()))):
        return "the model or the inputs have no values", "convert the real one to compare"
    return None


def convert(
    traced: Trace,
    model: nn.Module,
    config: TransformConfig,
    calibrated: Mapping[str, Calibrated] | None = None,
    *,
    strict: bool = False,
    progress: Progress | None = None,
    edit: PipelineEdit | None = None,
) -> None:
    """Converts `traced`, a prepared trace of `model`, in place; see `pn_compiler.transform`."""
    table: dict[str, Site] = {}
    left_alone = shared_with_whole(model, traced)
    all_notes = [*traced.notes]
    for region in traced.regions:
        own = {
            name.removeprefix(region.prefix): found
            for name, found in (calibrated or {}).items()
            if name.startswith(region.prefix)
        }
        left = frozenset(
            name.removeprefix(region.prefix) for name in left_alone if name.startswith(region.prefix)
        )
        _, passes = edited(
            edit, preparation_pipeline(), conversion_pipeline(config.inside(region.prefix), own, left)
        )
        result = run_pipeline(passes, region.gm, progress)
        region.finish()
        for name, site in take_sites(region.gm).items():
            alone = region.owner is not None and site.code == "PN201"
            reason = "called by code that torch.fx cannot trace" if alone else site.reason
            table[region.prefix + name] = dataclasses.replace(site, name=region.prefix + name, reason=reason)
        all_notes += [dataclasses.replace(note, site=region.prefix + note.site) for note in result.notes]
    found = account(model, traced, table, all_notes)
    _refuse_unknown_paths(config, found)
    if not found:
        all_notes.append(Diagnostic("PN100", "", "the model has no BatchNorm"))
    for note in all_notes:  # the table of sites has those of single BatchNorms, too
        logger.log(logging.DEBUG if note.site and note.severity == "note" else logging.INFO, "%s", note)
    refused = [str(note) for note in all_notes if note.severity == "warning"]
    if strict and refused:
        raise RefusedError("; ".join(refused))
    record(traced.root, found, tuple(all_notes))


def _refuse_unknown_paths(config: TransformConfig, found: Sequence[Site]) -> None:
    """Raises ConfigError if an anchor is meant for what is no BatchNorm of the model."""
    given = config.anchor if isinstance(config.anchor, Mapping) else {}
    unknown = sorted(set(given) - {site.name for site in found})
    if unknown:
        known = ", ".join(site.name for site in found[:3])
        raise ConfigError(
            f"anchor names {', '.join(unknown[:3])}: expected paths of BatchNorms, such as {known}"
        )


def _infer_shapes(region: Region, inputs: Inputs | None) -> None:
    """Infers the shapes that passes read, from a call of the whole model if there is one."""
    if region.prefix or region.owner is not None:
        inputs = None  # they are those of the model: neither of a part nor of a BatchNorm alone
    if inputs is not None:
        record_pixels(region.gm, inputs)
    infer_ranks(region.gm, inputs)


def measure_conversion(
    model: nn.Module,
    converted: nn.Module,
    inputs: Inputs | None,
    calibration: Iterable[Any] | None,
    logits: Logits = "auto",
    *,
    trained_on: bool = False,
) -> Fidelity | None:
    """Notes in `converted` how far its outputs are from those of `model`, as a whole and by site.

    Returns:
        The distance, on the calibration data or else on the example `inputs`; None without either.
    """
    found = [site for site in sites(converted) if site.kind != "skipped"]
    if _why_not_compared(model, inputs) or not found:
        return None
    fidelity = measure(
        model,
        converted,
        inputs if calibration is None else calibration,
        representative=calibration is not None,
        kept=any(site.warm_start for site in found),
        sites=[site.name for site in found],
        logits=logits,
        trained_on=trained_on,
    )
    table = (
        dataclasses.replace(site, error=fidelity.sites.get(site.name, site.error))
        for site in sites(converted)
    )
    note = Diagnostic("PN212", "", str(fidelity), fidelity.advice)
    logger.debug("%s", note)  # which the report says
    others = (other for other in notes(converted) if other.code != note.code)
    record(converted, tuple(table), (*others, note))
    return fidelity
