"""Bar charts by depth as geometry, which the page draws as SVG in the colours of its theme."""

import dataclasses
import math
from collections.abc import Sequence

from pn_compiler.analysis.power_plot import visible
from pn_compiler.base.tables import short_percent

_HEIGHT, _LINES = 200.0, 4
_WIDTH, _NARROW, _WIDE = 1080.0, 14.0, 40.0  # of all bars on a wide screen; of one, at least and at most
_TICK, _LETTER, _MARGIN = 6.5, 5.8, 14.0  # widths of a letter, and what is free beside texts
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
        left: where bars and lines begin.
    """

    title: str
    width: float
    height: float
    left: float
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
    lines = [(_HEIGHT * (1 - k / _LINES), _percent(top * k / _LINES)) for k in range(_LINES + 1)]
    left = _MARGIN + _TICK * max(len(text) for _, text in lines)
    step = min(_WIDE, max(_NARROW, _WIDTH / max(1, len(names))))
    bars = []
    for index, stack in enumerate(stacks):
        y = _HEIGHT
        for kind, value, tip in stack:
            height = _HEIGHT * min(value, top) / top
            y -= height
            bars.append(Bar(left + step * index, y, step * 0.86, height, kind, f"{names[index]}: {tip}"))
    every = -(-len(names) // _NAMED)
    named = [(left + step * (i + 0.5), _short(name)) for i, name in enumerate(names) if i % every == 0]
    below = _MARGIN + _LETTER * max((len(text) for _, text in named), default=0)
    return Chart(title, left + step * len(names), _HEIGHT + below, left, _HEIGHT, bars, named, lines)


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"...{name[3 - _LETTERS :]}"


def _percent(share: float) -> str:
    return short_percent(share, 3)


def _round(least: float) -> float:
    """The least number of one digit, or 2.5 or 1.5 times a power of ten, that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in _DIGITS if digit * power >= least * (1 - 1e-9))


_DIGITS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)


def error_chart(errors: Sequence[tuple[str, str, float]]) -> Chart | None:
    """Where fidelity is lost: for each site by depth its name, kind and error; None without a site."""
    if not errors:
        return None
    top = _LINES * _round(max(1e-9, *(error for _, _, error in errors)) / _LINES)
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
