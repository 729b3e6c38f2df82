"""The tables: accuracy at the best rate by batch size, and accuracy by rate."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks.tasks import Row
from benchmarks.transfer.options import Run

TOLERANCE = 3.0  # points below its own best that a rate may lose to count as one that works
Cell = dict[float, list[Row]]  # the rows of a method and a batch size, by rate


def cells(rows: Iterable[Row]) -> dict[tuple[str, int], Cell]:
    """The rows of one target by method and batch size, then by rate."""
    found: dict[tuple[str, int], Cell] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        run = Run(**row["run"])
        found[run.method, run.batch_size][run.rate].append(row)
    return {key: dict(sorted(cell.items())) for key, cell in found.items()}


def best_rate(cell: Cell) -> float:
    """The rate with the highest mean accuracy on validation images."""
    return max(cell, key=lambda rate: _mean(cell[rate], "validation"))


def at_best_rate(rows: Sequence[Row], methods: Sequence[str], batch_sizes: Sequence[int]) -> str:
    """Markdown: test accuracy, mean and deviation over seeds, at the rate that validation images choose."""
    found = cells(rows)
    lines = _head(["batch size", *map(str, batch_sizes)])
    for method in methods:
        texts = [_at_best(found.get((method, size), {})) for size in batch_sizes]
        lines.append(_line([method, *texts]))
    return "\n".join(lines)


def _at_best(cell: Cell) -> str:
    if not cell:
        return ""
    rate = best_rate(cell)
    edge = {min(cell): " ↓", max(cell): " ↑"}.get(rate, "") if len(cell) > 1 else ""
    return f"{_score(cell[rate])} ({rate:g}){edge}"


def by_rate(
    rows: Sequence[Row], methods: Sequence[str], batch_sizes: Sequence[int], rates: Sequence[float]
) -> str:
    """Markdown: test accuracy at each rate, and the rates around the best that lose at most 3 points."""
    found = cells(rows)
    lines = _head(["batch size", "method", *(f"{rate:g}" for rate in rates), "within 3 points"])
    for size in batch_sizes:
        for method in methods:
            cell = found.get((method, size), {})
            texts = [_score(cell[rate]) if rate in cell else "" for rate in rates]
            lines.append(_line([str(size), method, *texts, _range_text(cell)]))
    return "\n".join(lines)


def working_range(cell: Cell) -> tuple[float, float]:
    """The lowest and the highest of the neighbouring rates around the best one on test images that work."""
    rates = sorted(cell)
    scores = [_mean(cell[rate], "test") for rate in rates]
    best = first = last = scores.index(max(scores))
    while first > 0 and scores[first - 1] >= scores[best] - TOLERANCE:
        first -= 1
    while last < len(rates) - 1 and scores[last + 1] >= scores[best] - TOLERANCE:
        last += 1
    return rates[first], rates[last]


def _range_text(cell: Cell) -> str:
    if not cell:
        return ""
    low, high = working_range(cell)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _score(rows: Sequence[Row]) -> str:
    """Mean and deviation over seeds; † for each run that diverged."""
    test = [row["test"] for row in rows]
    deviation = f" ± {statistics.stdev(test):.1f}" if len(test) > 1 else ""
    marks = "†" * sum(row["diverged"] for row in rows)
    return f"{statistics.mean(test):.1f}{deviation}{' ' if marks else ''}{marks}"


def _mean(rows: Sequence[Row], part: str) -> float:
    return statistics.mean(row[part] for row in rows)


def _head(titles: Sequence[str]) -> list[str]:
    return [_line(titles), "| --- " * len(titles) + "|"]


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"
