"""Samples that are held out to measure what a change of a network costs, and the user's metric on them."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.base.progress import track
from pn_compiler.data.metric import Metric
from pn_compiler.data.samples import Samples
from pn_compiler.running.inputs import Inputs

BATCH = 16  # samples; the outputs of all sites for one batch are held in memory
_ROUNDING = 1e-9  # of a metric: 0.9 - 0.4 is not 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """Samples, and which of them serve which purpose, by index."""

    samples: Samples
    held_out: Tensor
    estimation: Tensor

    def batches(self, rows: Tensor, title: str) -> Iterator[Inputs]:
        """The samples `rows`, under a progress bar."""
        for part in track(self.parts(rows), title):
            yield self.samples.inputs(part.tolist())

    def parts(self, rows: Tensor) -> Sequence[Tensor]:
        """The numbers of the samples in each batch."""
        return torch.split(rows, 1 if self.samples.whole else BATCH)


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """The user's metric on the held-out samples, and its value before anything is changed."""

    metric: Metric
    rows: Sequence[Tensor]
    before: float

    @classmethod
    def of(cls, metric: Metric, network: nn.Module, data: Data, change: str) -> "Scale":
        """Measures `network`; `change` says what will be done to it, as in "frozen".

        Raises:
            ConfigError: the metric is nan or infinite.
        """
        rows = data.parts(data.held_out)
        before = metric.of(network, rows)
        if not math.isfinite(before):
            raise ConfigError(f"the metric {metric.name} is {before} before anything is {change}")
        return cls(metric, rows, before)


def ratio(difference: float, total: float) -> float:
    """``difference / total``; of nothing, 0 if nothing differs."""
    return difference / total if total else math.inf if difference else 0.0


def worst(errors: Iterable[float]) -> float:
    """The largest of `errors`; infinite if one is nan."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def affordable(lost: float, budget: float, score: float) -> bool:
    """Whether what the metric lost, down to `score`, is at most `budget`; nan is not."""
    return lost <= budget + _ROUNDING * abs(score)
