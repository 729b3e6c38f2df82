"""Bar charts by depth as geometry, which the page draws as SVG in the colours of its theme."""

import dataclasses
from collections.abc import Sequence

from pn_compiler.analysis.power_plot import visible

_HEIGHT, _LABELS, _LEFT, _STEP, _LEAST = 200.0, 150.0, 44.0, 14.0, 560.0
_NAMED = 150  # bars, of which each has its name below it
_LETTERS = 22


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """One rectangle.

    Attributes:
        kind: which colour it has.
        tip: what is shown when one points at it.
    """

    x: float
    y: float
    width: float
    height: float
    kind: str
    tip: str


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """Bars, names below them, and lines across with a figure each.

    Attributes:
        title: for those who cannot see it.
        names: x and text of each name.
        lines: y and text of each line.
    """

    title: str
    width: float
    height: float
    bottom: float
    bars: list[Bar]
    names: list[tuple[float, str]]
    lines: list[tuple[float, str]]


def bar_chart(
    title: str, names: Sequence[str], stacks: Sequence[Sequence[tuple[str, float, str]]], top: float
) -> Chart:
    """A stack of bars for each of `names`.

    Args:
        stacks: for each name, from below: kind, value and tip of each part.
        top: the value at the upper edge.
    """
    width = max(_LEAST, _LEFT + _STEP * len(names))
    step = (width - _LEFT) / max(1, len(names))
    bars = []
    for index, stack in enumerate(stacks):
        y = _HEIGHT
        for kind, value, tip in stack:
            height = _HEIGHT * min(value, top) / top
            y -= height
            bars.append(Bar(_LEFT + step * index, y, step * 0.86, height, kind, f"{names[index]}: {tip}"))
    every = -(-len(names) // _NAMED)
    named = [(_LEFT + step * (i + 0.5), _short(name)) for i, name in enumerate(names) if i % every == 0]
    lines = [(_HEIGHT * (1 - share), _percent(top * share)) for share in (0, 0.25, 0.5, 0.75, 1)]
    return Chart(title, width, _HEIGHT + _LABELS, _HEIGHT, bars, named, lines)


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"...{name[3 - _LETTERS :]}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def error_chart(errors: Sequence[tuple[str, str, float]]) -> Chart | None:
    """Where fidelity is lost: for each site by depth its name, kind and error; None without a site."""
    if not errors:
        return None
    top = max(1e-9, *(error for _, _, error in errors))
    stacks = [[(kind, error, _percent(error))] for _, kind, error in errors]
    return bar_chart("error of each normalizer by depth", [name for name, _, _ in errors], stacks, top)


def power_chart(title: str, shares: Sequence[tuple[str, Sequence[float]]]) -> Chart | None:
    """Shares of the power by depth, P1 at the bottom; None without a site."""
    if not shares:
        return None
    stacks = [
        [
            (f"p{number}", height, f"P{number} {_percent(share)}")
            for number, (height, share) in enumerate(zip(visible(parts), parts, strict=True), start=1)
        ]
        for _, parts in shares
    ]
    return bar_chart(title, [name for name, _ in shares], stacks, 1.0)
