"""The report of `pn_compiler.freeze_statistics`."""

import dataclasses

from pn_compiler.base.strict_json import to_json
from pn_compiler.base.tables import format_table


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSite:
    """One normalizer of the model.

    Attributes:
        name: its path.
        frozen: whether it became a constant scale and shift.
        damage: error of the network's output with only this site frozen; None if it cannot be frozen.
        reason: why it cannot be frozen; empty if it can.
    """

    name: str
    frozen: bool
    damage: float | None
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class FreezeReport:
    """What was frozen, and what it costs; ``str`` of it is for people, ``to_json()`` for machines.

    Errors are measured on the held-out samples: the difference from the original network's output, relative
    to that output, both as root mean squares over all samples and values. With several outputs, the worst
    counts.

    Attributes:
        sites: in the order of freezing, least damaging first; those that cannot be frozen come last.
        budget: the largest error that was accepted, or loss of the metric; None if there was no limit.
        error: error of the result.
        agreement: share of held-out samples whose predicted class is unchanged, from 0 to 1; None if the
            output is not a single tensor of logits, [N, K] with K > 1.
        estimation, held_out: number of samples used for the constants and for the errors.
        unit: "samples", or "batches" if batches could not be split: then batches are counted.
        metric: name of the user's metric, or "".
        metric_before, metric_after: its value for the original network and for the result.
    """

    sites: tuple[FrozenSite, ...]
    budget: float | None
    error: float
    agreement: float | None
    estimation: int
    held_out: int
    unit: str
    metric: str = ""
    metric_before: float | None = None
    metric_after: float | None = None

    @property
    def frozen(self) -> int:
        """Number of sites that were frozen."""
        return sum(site.frozen for site in self.sites)

    def to_json(self) -> str:
        return to_json(dataclasses.asdict(self) | {"frozen": self.frozen})

    def __str__(self) -> str:
        rows = [
            (s.name, "frozen" if s.frozen else "-", "-" if s.damage is None else f"{s.damage:.1e}", s.reason)
            for s in self.sites
        ]
        lines = [format_table(("site", "statistics", "damage", "remark"), rows)] if rows else []
        of_budget = "no budget" if self.budget is None else f"budget {100 * self.budget:.3g} %"
        of_budget = (
            "the budget is one of the metric" if self.metric and self.budget is not None else of_budget
        )
        lines.append(f"frozen      {self.frozen} of {len(self.sites)} sites")
        lines.append(f"error       {100 * self.error:.2f} % of the output (relative L2, {of_budget})")
        if self.agreement is not None:
            lines.append(f"agreement   {100 * self.agreement:.1f} % of the samples keep their class")
        if self.metric_before is not None and self.metric_after is not None:
            most = "no budget" if self.budget is None else f"may lose {self.budget:.4g}"
            values = f"{self.metric_before:.6g} -> {self.metric_after:.6g}"
            lines.append(f"metric      {self.metric}: {values} ({most})")
        lines.append(
            f"measured    on {self.held_out} {self.unit}, held out of the {self.estimation} estimated from"
        )
        return "\n".join(lines)
