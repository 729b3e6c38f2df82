"""The paper's power plot: shares of the power of each site, stacked, by depth."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pn_compiler.base.errors import ConfigError

if TYPE_CHECKING:
    from pn_compiler.analysis.diagnosis import Diagnosis, SitePower

LABELS = ("P1 constant per channel", "P2 instance mean", "P3 within an instance", "P4 instance deviation")
_SLIVER = 0.02  # the least height of a share that is not 0: less would not be seen
_PANEL, _HEAD, _SITE, _LEAST, _MOST = 2.6, 0.8, 0.17, 7.0, 60.0  # inches
_NAMED = 300  # sites; of more, only some have their names below them
_LETTERS = 28  # of a name, of whose beginning the rest is left out


def power_plot(diagnoses: "Mapping[str, Diagnosis]", path: Path) -> bytes:
    """The picture as a file; the ending of `path` gives its format.

    Args:
        diagnoses: a panel for each that has sites, by its title.

    Raises:
        ConfigError: matplotlib is missing or does not know the format, or there is no site.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no global state, no display
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install matplotlib (pn-compiler[plot])") from error
    panels = {title: found.sites for title, found in diagnoses.items() if found.sites}
    if not panels:
        raise ConfigError("there is no site to plot")
    sites = max(map(len, panels.values()))
    width = min(_MOST, max(_LEAST, _SITE * sites + 1))
    letters = max(min(_LETTERS, len(site.name)) for found in panels.values() for site in found)
    height = _HEAD + (_PANEL + 0.075 * letters) * len(panels)
    figure = Figure(figsize=(width, height), layout="constrained")
    kind = path.suffix.removeprefix(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ConfigError(f"cannot plot to {path}: expected an ending out of {', '.join(sorted(known))}")
    column = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (title, found) in zip(column, panels.items(), strict=True):
        _draw(axes, title, found)
    handles, labels = column[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    return content.getvalue()


def _draw(axes: Any, title: str, sites: "Sequence[SitePower]") -> None:
    """One panel: a bar for each site."""
    places = range(1, len(sites) + 1)
    bottoms = [0.0] * len(sites)
    shares = [visible(site.shares) for site in sites]
    for index, label in enumerate(LABELS):
        heights = [share[index] for share in shares]
        axes.bar(places, heights, 1.0, bottom=bottoms, label=label, color=f"C{index}", linewidth=0)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    axes.set(xlim=(0.5, len(sites) + 0.5), ylim=(0, 1), ylabel="share of power")
    drawn_higher = any(0 < part < _SLIVER for site in sites for part in site.shares)
    note = f"; shares below {100 * _SLIVER:g} % are drawn {100 * _SLIVER:g} % high" if drawn_higher else ""
    axes.set_xlabel(f"depth (normalized layers){note}", fontsize=8)
    step = -(-len(sites) // _NAMED)
    named = list(zip(places, sites, strict=True))[::step]
    names = [_short(site.name) for _, site in named]
    axes.set_xticks([place for place, _ in named], names, rotation=90, fontsize=6, parse_math=False)


def visible(shares: Sequence[float]) -> list[float]:
    """`shares` with those that are not 0 at least as high as can be seen, scaled to the same sum."""
    total = sum(shares)
    raised = [max(share, _SLIVER) if share > 0 else 0.0 for share in shares]
    spare = sum(high - _SLIVER for high in raised if high)  # what the higher ones can give
    excess = sum(raised) - total
    return [high - excess * (high - _SLIVER) / spare if high and spare else high for high in raised]


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"...{name[3 - _LETTERS :]}"
