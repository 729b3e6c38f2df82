"""Replaces instance statistics by constants, so that normalizers fold as BatchNorm does."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pn_compiler.base.config import FreezeConfig, MetricFunction
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.options import pick
from pn_compiler.base.progress import track
from pn_compiler.data.metric import Metric
from pn_compiler.data.samples import Samples
from pn_compiler.freezing.freeze_report import FreezeReport, FrozenSite
from pn_compiler.freezing.held_out import Data, Scale, affordable, ratio, worst
from pn_compiler.freezing.site_constants import Constants, Norm, Norms, estimate, replaced
from pn_compiler.graph.graph_module import is_converted, notes, record, sites
from pn_compiler.graph.graph_utils import module_calls
from pn_compiler.graph.pass_base import run_pipeline
from pn_compiler.graph.ranks import infer_ranks
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.nn import FoldedNorm, Normalizer
from pn_compiler.passes import freeze_pipeline
from pn_compiler.pipeline.folding import fold
from pn_compiler.regions.regions import named_graphs
from pn_compiler.running.evaluation import run, untouched
from pn_compiler.running.losses import floating_outputs, is_logits, squared_norm, widened


def freeze_statistics(
    model: nn.Module,
    calibration: Any,
    *,
    budget: float | None = FreezeConfig.budget,
    metric: str | MetricFunction | None = FreezeConfig.metric,
    held_out: float = FreezeConfig.held_out,
    max_samples: int = FreezeConfig.max_samples,
) -> tuple[nn.Module, FreezeReport]:
    """Replaces normalizers by constants, least damaging first, within an error budget.

    A frozen normalizer is a scale and a shift per channel, like BatchNorm at inference, and folds into the
    convolution before it. That makes the network faster, but an instance is no longer normalized by its own
    statistics, which changes the output; the report says by how much.

    Each site is first frozen alone, to measure its damage. Sites are then frozen in order of increasing
    damage, as many as the budget allows; bisection finds that number. The constants are a least-squares fit,
    per channel, of a site's original output to its input behind the other frozen sites.

    Args:
        model: a result of `transform` or `fold`, or any other module that torch.fx can trace; the sites are
            its ``nn.GroupNorm`` modules, and what `fold` makes of anchored ones. It is left untouched. Proxy
            normalization is folded first.
        calibration: batches of inputs like those that the model will see, such as a DataLoader or a list.
            Of a tuple or list the first element is the input, as in (images, labels), and as many as the
            forward needs, as in (left, right); a mapping holds arguments by name; anything else is the one
            argument. They are read once, and held in memory.
        budget: the largest error of the output, such as 0.01; see `FreezeReport`. None freezes all sites.
            With `metric` it is what the metric may lose, in its own units.
        metric: (outputs, labels) -> a number, higher is better; or its name, ``package.module:function``,
            which is imported. Batches are then (inputs, labels). It is called once with the outputs and
            labels of all held-out samples, joined along their first axis; where batches cannot be split,
            with lists that have an entry for each batch. The order of sites is that of the error all the
            same, which tells sites apart that change no prediction.
        held_out: share of the samples that is used only to measure errors, never to estimate constants.
        max_samples: the most samples to read; reading also stops at 1 GB.

    Returns:
        (the frozen network, a torch.fx.GraphModule in eval mode for `export_onnx`; the report).

    Raises:
        ConfigError: an impossible option; fewer than two samples; the model does not run on them, or values
            are nan or infinite; samples have no labels, or the metric fails.
        TraceError: torch.fx cannot trace the forward of `model`.
        UnsupportedModelError: the model cannot be copied.

    Source: docs/static.md.
    """
    pick(FreezeConfig, locals())  # checks them
    network = fold(model)
    with untouched(network):
        samples = Samples.read(calibration, network, max_samples, "calibration", labelled=metric is not None)
        data = Data(samples, *samples.divide(held_out, torch.Generator().manual_seed(0)))
        scale = None if metric is None else Scale.of(Metric(metric, samples), network, data, "frozen")
        norms, refused = _find_sites(network)
        alone = estimate(network, norms, data.batches(data.estimation, "statistics"), frozen=False)
        refused |= _unusable(norms, alone)
        constants = {name: alone[name] for name in norms if name not in refused}
        damages = _damages(network, norms, constants, data)
        order = sorted(constants, key=damages.__getitem__)
        best, count = _longest(
            len(order),
            lambda length: _freeze(network, {name: norms[name] for name in order[:length]}, data, scale),
            math.inf if budget is None else budget,
        )
    frozen = set(order[:count])
    if is_converted(network):
        table = tuple(dataclasses.replace(s, static=s.static or s.name in frozen) for s in sites(network))
        record(best.network, table, notes(network))
    rows = [FrozenSite(name, name in frozen, damages[name]) for name in order]
    rows += [FrozenSite(name, False, None, reason) for name, reason in refused.items()]
    return best.network, FreezeReport(
        tuple(rows), budget, best.errors.relative_l2, best.errors.agreement,
        len(data.estimation), len(data.held_out), "batches" if samples.whole else "samples",
        "" if scale is None else scale.metric.name, None if scale is None else scale.before, best.score,
    )  # fmt: skip


# Sites ---------------------------------------------------------------------------------------------


def _find_sites(network: nn.Module) -> tuple[Norms, dict[str, str]]:
    """(the normalizers that can be frozen, in call order; why others cannot), both by path."""
    called = [
        f"{path}.{name}" if path else name
        for path, graph in named_graphs(network)
        for name in module_calls(graph)
    ]
    norms: dict[str, Norm] = {}
    refused = {}
    for name, norm in network.named_modules():
        if not isinstance(norm, nn.GroupNorm | Normalizer | FoldedNorm):
            continue
        if name not in called or not isinstance(norm, nn.GroupNorm | FoldedNorm):
            refused[name] = "it is called by code that torch.fx cannot trace, or not at all"
        elif has_hooks(norm):
            refused[name] = "it has hooks"
        else:
            norms[name] = norm
    return {name: norms[name] for name in called if name in norms}, refused


def _unusable(norms: Norms, constants: Constants) -> dict[str, str]:
    """Why a site has no usable constants, by path."""
    reasons = {name: "the calibration data does not reach it" for name in norms if name not in constants}
    for name, values in constants.items():
        if not all(bool(value.isfinite().all()) for value in values):
            reasons[name] = "the calibration data makes values that are nan or infinite there"
    return reasons


# Errors --------------------------------------------------------------------------------------------


class _Errors:
    """Distance of a frozen network's outputs from the original's, accumulated batch by batch."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}  # of squares: of the difference, of the original
        self._same = self._classified = 0

    def add(self, outputs: Any, before: Any) -> None:
        """Adds the outputs for one batch. Raises ConfigError if there is nothing to compare."""
        actual, expected = _floating(outputs), _floating(before)
        for name, tensor in expected.items():
            if not tensor.isfinite().all():
                raise ConfigError(f"{name} of the model holds nan or infinite values on the calibration data")
            old = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = old[0] + squared_norm(actual[name] - tensor), old[1] + squared_norm(tensor)
        if len(expected) == 1 and is_logits(tensor):
            self._same += int((actual[name].argmax(1) == tensor.argmax(1)).sum())
            self._classified += len(tensor)

    @property
    def relative_l2(self) -> float:
        """The error of the worst output; infinite where it is nan."""
        return worst(math.sqrt(ratio(*sums)) for sums in self._sums.values())

    @property
    def agreement(self) -> float | None:
        return self._same / self._classified if self._classified else None


def _floating(outputs: Any) -> dict[str, Tensor]:
    """The floating-point tensors of an output, in at least float32. Raises ConfigError if there is none."""
    tensors = floating_outputs(outputs)
    if not tensors:
        raise ConfigError("the output holds no floating-point tensor: there is no error to measure")
    return {name: widened(tensor) for name, tensor in tensors.items()}


def _damages(network: nn.Module, norms: Norms, constants: Constants, data: Data) -> dict[str, float]:
    """Error of the output with only that site frozen, for each site."""
    errors = {name: _Errors() for name in constants}
    for inputs in data.batches(data.held_out, "damage of each site"):
        before = run(network, inputs.map(torch.clone), "the calibration data")
        for name in track(constants, "sites"):
            with replaced(norms, {name: constants[name]}):
                errors[name].add(run(network, inputs.map(torch.clone), "the calibration data"), before)
    return {name: error.relative_l2 for name, error in errors.items()}


# Freezing ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Frozen:
    """A network with constants, and its errors on the held-out samples.

    Attributes:
        score: the user's metric, if there is one.
        lost: of it.
    """

    network: nn.Module
    errors: _Errors
    score: float | None = None
    lost: float | None = None


def _freeze(network: nn.Module, norms: Norms, data: Data, scale: Scale | None) -> _Frozen:
    """A copy of `network` with all of `norms` frozen."""
    title = f"{len(norms)} sites frozen"
    constants = estimate(network, norms, data.batches(data.estimation, title), frozen=True)
    frozen = copy.deepcopy(network)
    for path, graph in named_graphs(frozen):
        prefix = f"{path}." if path else ""
        infer_ranks(graph, None if path else data.samples.inputs([0]))
        own = {name.removeprefix(prefix): pair for name, pair in constants.items() if name.startswith(prefix)}
        if own:
            run_pipeline(freeze_pipeline(own), graph)
    errors, outputs = _Errors(), []
    for inputs in data.batches(data.held_out, title):
        before = run(network, inputs.map(torch.clone), "the calibration data")
        actual = run(frozen, inputs, "the calibration data")
        errors.add(actual, before)
        outputs += [actual] if scale else []
    frozen.requires_grad_(False)
    if scale is None:
        return _Frozen(frozen, errors)
    score = scale.metric.value(outputs, scale.rows)
    return _Frozen(frozen, errors, score, scale.before - score)


def _longest(total: int, freeze: Callable[[int], _Frozen], budget: float) -> tuple[_Frozen, int]:
    """The result with the most frozen sites whose error is at most `budget`, and their number.

    Both this result and the one with one site more have been measured; the latter exceeds the budget. Larger
    numbers that might fall within the budget again are not searched for.
    """
    best, low, high = freeze(total), total, total + 1
    if not _fits(best, budget):
        best, low, high = freeze(0), 0, total
    while high - low > 1:
        middle = (low + high) // 2
        tried = freeze(middle)
        if _fits(tried, budget):
            best, low = tried, middle
        else:
            high = middle
    return best, low


def _fits(tried: _Frozen, budget: float) -> bool:
    """Whether the error, or what the metric loses, is at most `budget`; nan is not."""
    error = tried.errors.relative_l2
    if tried.lost is None:
        return math.isfinite(error) and error <= budget
    return math.isfinite(error) and affordable(tried.lost, budget, tried.score or 0.0)
