"""What the BatchNorms of a teacher give for the samples that a student is trained on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pn_compiler.data.samples import Samples, cut, join
from pn_compiler.recovery.site_matching import SiteMatching

_KEPT_BYTES = 2**29


class SiteTargets:
    """Tells `sites` what to compare the student with, computed once if it takes at most 512 MB as float16.

    They are computed for all samples before the first step, in an order of its own, so that a training that
    is resumed sees the same values.

    Args:
        sites: of student and teacher.
        samples: inputs of both.
        batches: the samples of each step. If few come round twice, they are not worth keeping.
    """

    def __init__(self, sites: SiteMatching, samples: Samples, batches: Sequence[Tensor]) -> None:
        self._sites, self._samples = sites, samples
        self._kept: dict[int, Any] = {}
        self._variances: list[list[float]] = []
        steps = [row for rows in batches for row in rows.tolist()]
        every = sorted(set(steps))
        if sites and not samples.whole and len(steps) >= 2 * len(every) > 0:
            self._keep(torch.split(torch.tensor(every), len(batches[0])), len(every))

    def load(self, rows: Tensor) -> None:
        """Makes the next comparison that of the samples `rows`."""
        numbers = rows.tolist()
        if not self._kept:
            self._sites.observe_teacher(self._samples.inputs(numbers))
            return
        values = join([self._kept[number] for number in numbers])
        self._sites.targets = [
            [(x, variance) for x, variance in zip(calls, variances, strict=True)]
            for calls, variances in zip(values, self._variances, strict=True)
        ]

    def _keep(self, batches: Sequence[Tensor], total: int) -> None:
        kept: dict[int, Any] = {}
        variances: list[list[list[float]]] = []
        held = done = 0
        for rows in batches:
            self._sites.observe_teacher(self._samples.inputs(rows.tolist()))
            values = [[x.half() for x, _ in calls] for calls in self._sites.targets]
            leaves = pytree.tree_leaves(values)
            held, done = held + sum(x.nbytes for x in leaves), done + len(rows)
            parts = cut(values)
            fits = all(bool(x.isfinite().all()) for x in leaves) and held / done * total <= _KEPT_BYTES
            if not fits or parts is None or len(parts) != len(rows):
                return
            variances.append([[variance for _, variance in calls] for calls in self._sites.targets])
            kept.update(zip(rows.tolist(), parts, strict=True))
        if len({tuple(map(len, each)) for each in variances}) == 1:  # the same calls in each batch
            self._kept, self._variances = kept, _means(variances, [len(rows) for rows in batches])


def _means(variances: list[list[list[float]]], sizes: list[int]) -> list[list[float]]:
    """The mean over batches of these sizes, of each call of each site."""
    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    return [
        (torch.tensor(calls, dtype=torch.float64).T @ weights).tolist()
        for calls in zip(*variances, strict=True)
    ]
