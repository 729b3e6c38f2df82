"""What `pn_compiler.diagnose` returns: a table, JSON, and the paper's power plot."""

import dataclasses
import os
from pathlib import Path

from pn_compiler.analysis.power_plot import power_plot
from pn_compiler.base.strict_json import to_json
from pn_compiler.base.tables import format_table

COLLAPSED = 0.5  # a site with a larger share of P1 counts as collapsed: most of its power is a constant
UNIFORM = 1e-3  # below this share of P2 + P4, a site's instance statistics count as constant

_NAMED = 5  # sites in a line of text


@dataclasses.dataclass(frozen=True, slots=True)
class SitePower:
    """Power decomposition at one call of one normalizer; see `diagnose` for the definitions.

    Attributes:
        name: path of the module; the second call within a forward is ``name:2``.
        kind: "BN", "LN", "GN" or "IN" by what is normalized over, with "+PN" for proxy normalization.
        channels: C.
        samples: number of instances seen.
        p1, p2, p3, p4: the four powers, averaged over channels.
    """

    name: str
    kind: str
    channels: int
    samples: int
    p1: float
    p2: float
    p3: float
    p4: float

    @property
    def power(self) -> float:
        """P1 + P2 + P3 + P4, the mean square of y: 1, up to eps, if y is normalized right here."""
        return self.p1 + self.p2 + self.p3 + self.p4

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """The four powers relative to their sum; zeros if y is zero."""
        power = self.power or 1.0
        return self.p1 / power, self.p2 / power, self.p3 / power, self.p4 / power


@dataclasses.dataclass(frozen=True, slots=True)
class Diagnosis:
    """Result of `pn_compiler.diagnose`; ``str`` of it is a table.

    Attributes:
        sites: in the order in which the forward calls them, that is, by depth.
        notes: what was left out, and what you need to know to read the figures.
    """

    sites: tuple[SitePower, ...]
    notes: tuple[str, ...] = ()

    @property
    def collapsed(self) -> tuple[SitePower, ...]:
        """Sites where P1 is more than half of the power: channel-wise constant functions (LayerNorm)."""
        return tuple(site for site in self.sites if site.shares[0] > COLLAPSED)

    @property
    def uniform(self) -> tuple[SitePower, ...]:
        """Sites where P2 + P4 is less than 0.1 % of what is not P1: instance statistics do not vary."""
        return tuple(s for s in self.sites if s.power and s.p2 + s.p4 < UNIFORM * (s.power - s.p1))

    def to_json(self) -> str:
        sites = [
            dataclasses.asdict(site) | {"power": site.power, "shares": site.shares} for site in self.sites
        ]
        flagged = {name: [s.name for s in getattr(self, name)] for name in ("collapsed", "uniform")}
        return to_json({"sites": sites, **flagged, "notes": self.notes})

    def __str__(self) -> str:
        header = ("site", "kind", "channels", "power", "P1 %", "P2 %", "P3 %", "P4 %")
        rows = [
            (s.name, s.kind, str(s.channels), f"{s.power:.3f}", *(f"{100 * p:.1f}" for p in s.shares))
            for s in self.sites
        ]
        lines = [format_table(header, rows)] if rows else []
        lines += _verdict("channel-wise collapse (P1 above 50 %)", self.collapsed, len(self.sites))
        lines += _verdict("instance statistics hardly vary (P2 + P4)", self.uniform, len(self.sites))
        return "\n".join([*lines, *self.notes])

    def plot(self, path: str | os.PathLike[str], title: str = "Power of pre-activations by depth") -> None:
        """Draws the paper's power plot: shares of the power, stacked, by depth.

        Args:
            path: the file to write; its ending gives the format, such as ``.png``, ``.pdf`` or ``.svg``.
            title: stands above it.

        Raises:
            ConfigError: matplotlib is missing or does not know the format, or there is no site.
            ExportError: the file cannot be written.
        """
        from pn_compiler.base.files import write_atomically  # onnx is only imported when it is needed

        write_atomically(Path(path), power_plot({title: self}, Path(path)))


def _verdict(title: str, affected: tuple[SitePower, ...], total: int) -> list[str]:
    if not affected:
        return []
    names = [site.name for site in affected[:_NAMED]] + (["..."] if len(affected) > _NAMED else [])
    return [f"{title} at {len(affected)} of {total} sites: {', '.join(names)}"]
