"""anchor="auto": for each site the least anchor with which the network stays within a budget."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pn_compiler.base.config import TransformConfig
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.progress import track
from pn_compiler.data.metric import Metric
from pn_compiler.data.samples import Outputs, Samples
from pn_compiler.freezing.held_out import BATCH, Data, Scale, affordable, ratio, worst
from pn_compiler.graph.graph_module import sites
from pn_compiler.nn import Normalizer
from pn_compiler.passes import PipelineEdit
from pn_compiler.pipeline.conversion import convert
from pn_compiler.regions.regions import Trace
from pn_compiler.running.evaluation import run, untouched
from pn_compiler.running.losses import (
    distance,
    divergence,
    floating_outputs,
    is_logits,
    squared_norm,
    widened,
)

COMMON = (0.0, 0.25, 0.5, 0.75, 0.875, 1.0)  # what is tried for all sites alike
_MOST_SAMPLES = 512
_OF_DAMAGES = 16  # samples; an order of the sites needs no more
_STEPS = 8  # of the bisection for the anchors of each site
_ROUNDING = 1e-5  # of outputs in float32: an anchor of 1 is not exactly the network as it was
_NAME = "the calibration data"

Anchors = dict[str, float]


def choose_anchors(
    traced: Trace,
    model: nn.Module,
    config: TransformConfig,
    calibration: Iterable[Any] | None,
    edit: PipelineEdit | None = None,
) -> Anchors:
    """The anchors of all sites in `traced`, by path, for ``TransformConfig.anchor``.

    First the least anchor is found that serves all sites alike, on a coarse grid. Then each site gets its
    own: with d_s the damage of site s alone without an anchor while all others have 1, and the damage of an
    anchor b growing as d_s (1 - b)^2, the sum of anchors is least within a given sum of damages for
    b_s = max(0, 1 - t / d_s); bisection finds the largest t that keeps the budget. The better of the two is
    taken. Damages are measured on one half of the samples; the other half alone decides about the budget.

    Args:
        traced: the prepared trace; it is left untouched.
        model: the model that it was traced from.
        config: with ``anchor="auto"``.
        calibration: batches of inputs, or of (inputs, labels) with a metric; read once.
        edit: of the pipeline, as in `convert`.

    Raises:
        ConfigError: there are no samples, or too few; the networks do not run on them; or even anchors of 1
            exceed the budget.
    """
    if calibration is None:
        raise ConfigError(needs_samples())
    student = copy.deepcopy(traced)
    warm_start = "running_stats" if config.warm_start == "calibrate" else config.warm_start
    config_of_student = dataclasses.replace(config.with_anchors({}), warm_start=warm_start)
    convert(student, model, config_of_student, edit=edit)
    table = sites(student.root)
    frozen = {site.name: 1.0 for site in table if site.code == "PN107"}  # what only 1 converts
    modules = dict(student.root.named_modules(remove_duplicate=False))
    found = {site.name: modules.get(site.name) for site in table if site.kind != "skipped"}
    norms = {name: norm for name, norm in found.items() if isinstance(norm, Normalizer)}  # not a pass's own
    if not norms:
        return frozen
    with untouched(model), untouched(student.root):
        return frozen | _search(_Search.of(model, student.root, norms, config, calibration))


def needs_samples() -> str:
    """What to do about anchor="auto" without data."""
    return (
        "anchor='auto' needs samples: give calibration=, batches of inputs like those that the network will "
        "see, or a number, such as anchor=0.75"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Search:
    """A network whose anchors are varied, and what decides about them.

    Attributes:
        expected: the outputs of the BatchNorm network.
        scale: the user's metric, if there is one.
    """

    student: nn.Module
    norms: Mapping[str, Normalizer]
    expected: Outputs
    data: Data
    scale: Scale | None
    budget: float

    @classmethod
    def of(
        cls,
        model: nn.Module,
        student: nn.Module,
        norms: Mapping[str, Normalizer],
        config: TransformConfig,
        calibration: Iterable[Any],
    ) -> "_Search":
        labelled = config.metric is not None
        samples = Samples.read(calibration, model, _MOST_SAMPLES, "choice of anchors", labelled=labelled)
        data = Data(samples, *samples.divide(0.5, torch.Generator().manual_seed(0)))
        scale = None
        if config.metric is not None:
            scale = Scale.of(Metric(config.metric, samples), model, data, "converted")
        expected = Outputs(model, samples, 1 if samples.whole else BATCH)
        return cls(student, norms, expected, data, scale, config.anchor_budget)

    def keeps(self, anchors: Mapping[str, float]) -> bool:
        """Whether the network with these anchors stays within the budget."""
        return self.cost(anchors)[1]

    def cost(self, anchors: Mapping[str, float]) -> tuple[float, bool]:
        """(error, or what the metric loses, on the held-out samples; whether that is within the budget)."""
        self.put(anchors)
        rows = self.data.parts(self.data.held_out)
        gap, outputs = _Gap(), []
        for part in track(rows, "anchors: error"):
            actual = run(self.student, self.data.samples.inputs(part.tolist()), _NAME)
            if self.scale is None:
                gap.add(actual, self.expected(part.tolist()))
            else:
                outputs.append(actual)
        if self.scale is None:
            return gap.worst, gap.worst <= self.budget + _ROUNDING
        score = self.scale.metric.value(outputs, rows)
        lost = self.scale.before - score
        return lost, affordable(lost, self.budget, score)

    def put(self, anchors: Mapping[str, float]) -> None:
        """Sets the anchors of these sites."""
        for name, anchor in anchors.items():
            cast("Tensor", self.norms[name].anchor).fill_(anchor)

    def same(self, anchor: float) -> Anchors:
        """`anchor` for all sites."""
        return dict.fromkeys(self.norms, anchor)

    def damages(self) -> Anchors:
        """For each site how far outputs move if it alone has no anchor, and all others have 1."""
        damages = self.same(0.0)
        data, count = self.data, 2 if self.data.samples.whole else _OF_DAMAGES
        self.put(self.same(1.0))
        for inputs in data.batches(data.estimation[:count], "anchors: damage of each site"):
            before = run(self.student, inputs.map(torch.clone), _NAME)
            for name in track(self.norms, "sites"):
                self.put({name: 0.0})
                after = run(self.student, inputs.map(torch.clone), _NAME)
                self.put({name: 1.0})
                damages[name] += distance(after, before)
        return damages


class _Gap:
    """How far outputs are from those of the BatchNorm network, accumulated batch by batch."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}  # of the difference, and what it is relative to
        self._logits: set[str] = set()

    def add(self, outputs: Any, before: Any) -> None:
        """Adds the outputs for one batch. Raises ConfigError if they cannot be compared."""
        actual, expected = floating_outputs(outputs), floating_outputs(before)
        if not expected or {k: x.shape for k, x in actual.items()} != {
            k: x.shape for k, x in expected.items()
        }:
            raise ConfigError(
                "the outputs cannot be compared with those of the original network: pass metric=, a function "
                "of outputs and labels"
            )
        for name, tensor in expected.items():
            s, t = widened(actual[name]), widened(tensor)
            if is_logits(t):
                self._logits.add(name)
                new = (divergence(s, t) or 0.0) * len(t), float(len(t))
            else:
                new = squared_norm(s - t), squared_norm(t)
            old = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = old[0] + new[0], old[1] + new[1]

    @property
    def worst(self) -> float:
        """The largest over all outputs: mean divergence of logits, relative L2 error of others."""
        errors = {name: ratio(*sums) for name, sums in self._sums.items()}
        return worst(e if name in self._logits else math.sqrt(e) for name, e in errors.items())


def _search(search: _Search) -> Anchors:
    common = _least_common(search)
    if not any(common.values()):
        return common
    own = _least_of_each(search.damages(), search.keeps)
    return common if own is None else min(common, own, key=lambda anchors: sum(anchors.values()))


def _least_common(search: _Search) -> Anchors:
    """The least anchor of the grid that keeps the budget, for all sites."""
    low, high = -1, len(COMMON) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if search.keeps(search.same(COMMON[middle])):
            high = middle
        else:
            low = middle
    anchors = search.same(COMMON[high])
    if COMMON[high] == 1:
        cost, kept = search.cost(anchors)
        if not kept:
            what = "the error is" if search.scale is None else f"{search.scale.metric.name} loses"
            raise ConfigError(
                f"even with an anchor of 1 everywhere {what} {cost:.3g}, more than anchor_budget="
                f"{search.budget:.3g}: raise that, or take norm='rms', with which 1 changes nothing"
            )
    return anchors


def _least_of_each(damages: Anchors, keeps: Callable[[Anchors], bool]) -> Anchors | None:
    """The anchors of least sum among those of `choose_anchors`; None if none of them keeps the budget."""
    finite = [damage for damage in damages.values() if 0 < damage < math.inf]
    if not finite:
        return None
    top = max(finite)
    bounded = {  # nan counts as the largest
        name: max(damage, 1e-6 * top) if math.isfinite(damage) else top for name, damage in damages.items()
    }
    low, high = math.log(1e-3 * min(bounded.values())), math.log(top)
    best = None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        anchors = {name: _rounded(1 - math.exp(middle) / damage) for name, damage in bounded.items()}
        if keeps(anchors):
            best, low = anchors, middle
        else:
            high = middle
    return best


def _rounded(anchor: float) -> float:
    """`anchor` in hundredths, rounded up, and at least 0."""
    return max(0, math.ceil(100 * anchor)) / 100
