"""The rows of `benchmarks.latency` as a bar chart on a logarithmic scale: times of BatchNorm."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.variants import DESCRIPTIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TICKS = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
_WIDTH, _HEAD, _PANEL = 9.0, 1.0, 2.4  # inches
_FILLED = 0.8  # of the distance between networks, by the bars of one


def file_types() -> list[str]:
    """File types that matplotlib can write. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    return sorted(Figure().canvas.get_supported_filetypes())


def plot(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Bars by network and variant; a panel for each runtime, batch size and number of threads."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    panels: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
        panel = panels.setdefault(f"{row['runtime']}, batch {row['batch']}, {threads}", {})
        panel[row["variant"], row["model"]] = row["ratio"]
    networks = list(dict.fromkeys(row["model"] for row in rows))
    first, *variants = dict.fromkeys(row["variant"] for row in rows)
    figure = Figure(figsize=(_WIDTH, _HEAD + _PANEL * len(panels)), layout="constrained")
    column = figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (title, ratios) in zip(column, panels.items(), strict=True):
        _draw(axes, ratios, variants, networks)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_ylabel(f"times {first}")
    _scale(column[0], [row["ratio"] for row in rows])
    handles, labels = column[0].get_legend_handles_labels()
    named = [DESCRIPTIONS.get(label, label) for label in labels]
    figure.legend(handles, named, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def _scale(axes: Any, ratios: Sequence[float]) -> None:
    """A logarithmic scale, on which one long bar leaves room to tell the others apart."""
    low, high = min(*ratios, 1.0) / 1.15, max(ratios) * 1.5  # room for the figures above the bars
    axes.set_yscale("log", base=2)
    axes.set_ylim(low, high)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _draw(
    axes: Any, ratios: dict[tuple[str, str], float], variants: Sequence[str], networks: Sequence[str]
) -> None:
    """One panel; a bar that was not measured leaves a gap."""
    width = _FILLED / max(1, len(variants))
    axes.axhline(1, color="black", linewidth=0.8)
    for index, variant in enumerate(variants):
        heights = [ratios.get((variant, network), float("nan")) for network in networks]
        places = [place + (index + 0.5) * width - _FILLED / 2 for place in range(len(networks))]
        bars = axes.bar(places, heights, 0.92 * width, color=f"C{index}", label=variant)
        labels = ["" if height != height else f"{height:.2f}" for height in heights]
        for text in axes.bar_label(bars, labels, rotation=90, padding=2, fontsize=7):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.set_xticks(range(len(networks)), networks)
    axes.spines[["top", "right"]].set_visible(False)
