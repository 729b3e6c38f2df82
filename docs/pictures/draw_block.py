"""Draws block.svg beside this file: one block of a network before and after the conversion, and in the file.

Run by ``make pictures``. The colours follow the reader's light or dark mode.
"""

from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path

PICTURE = Path(__file__).with_name("block.svg")

WIDTH, HEIGHT = 880, 446
BOX = 118, 54
TOPS = {"before": 62, "after": 196, "file": 330}  # of the rows
GRID = 34, 5, 4, 17  # left edge, samples, channels, step

STYLE = """
svg { --page: #ffffff; --ink: #1f2933; --soft: #52606d; --line: #cbd2d9; --plain: #f1f4f7;
      --batch: #c2410c; --batch-fill: #ffedd5; --own: #0f766e; --own-fill: #ccfbf1; }
@media (prefers-color-scheme: dark) {
  svg { --page: #0d1117; --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --plain: #1c2129;
        --batch: #fb923c; --batch-fill: #4a2410; --own: #2dd4bf; --own-fill: #0b3b38; }
}
text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--ink); }
.title { font-size: 15px; font-weight: 600; }
.name { font-size: 14px; font-weight: 600; text-anchor: middle; }
.note { font-size: 11.5px; fill: var(--soft); text-anchor: middle; }
.start { text-anchor: start; }
.page { fill: var(--page); stroke: var(--line); }
.plain { fill: var(--plain); stroke: var(--line); stroke-width: 1.5; }
.batch { fill: var(--batch-fill); stroke: var(--batch); stroke-width: 1.5; }
.own { fill: var(--own-fill); stroke: var(--own); stroke-width: 1.5; }
.arrow { stroke: var(--soft); stroke-width: 1.5; fill: none; marker-end: url(#head); }
.head { fill: var(--soft); }
"""

HEAD = (
    '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker>'
)


def text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, name: str, note: str, kind: str = "plain") -> str:
    """An operator, with its upper left corner at x, y."""
    width, height = BOX
    middle = x + width / 2
    frame = f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="8" class="{kind}"/>'
    if not note:
        return frame + text(middle, y + 32, name, "name")
    return frame + text(middle, y + 24, name, "name") + text(middle, y + 42, note, "note")


def arrow(start: float, end: float, y: float) -> str:
    return f'<path class="arrow" d="M{start:g} {y:g} H{end:g}"/>'


def chain(top: float, operators: list[tuple[str, str, str]], places: list[float]) -> Iterator[str]:
    """Operators (name, note, kind) from left to right, with arrows between them."""
    width, height = BOX
    for x, operator in zip(places, operators, strict=True):
        yield box(x, top, *operator)
    for x, following in pairwise(places):
        yield arrow(x + width + 4, following - 4, top + height / 2)


def grid(top: float, marked: str) -> Iterator[str]:
    """Feature maps: a column for each sample, a row for each channel; those that share statistics marked."""
    left, samples, channels, step = GRID
    for sample in range(samples):
        for channel in range(channels):
            together = channel == 1 if marked == "batch" else sample == 1
            kind = marked if together else "plain"
            x, y = left + step * sample, top - 6 + step * channel
            yield f'<rect x="{x}" y="{y}" width="14" height="14" rx="2" class="{kind}"/>'


def rows() -> Iterator[str]:
    width, height = BOX
    places = [160 + 142 * index for index in range(5)]

    top = TOPS["before"]
    yield text(24, top - 24, "Before: a channel shares its statistics with the whole batch", "title")
    yield from grid(top, "batch")
    operators = [("Conv", "W, b", "plain"), ("BatchNorm", "of the batch", "batch"), ("ReLU", "", "plain")]
    yield from chain(top, [*operators, ("Conv", "W, b", "plain")], [*places[:3], places[4]])

    top = TOPS["after"]
    yield text(24, top - 24, "After: each sample by itself", "title")
    yield from grid(top, "own")
    normalizer, proxy = ("Normalizer", "of the sample", "own"), ("Proxy Norm", "of parameters", "own")
    operators = [("Conv", "W, b", "plain"), normalizer, ("ReLU", "", "plain"), proxy]
    yield from chain(top, [*operators, ("Conv", "W', b'", "plain")], places)

    top = TOPS["file"]
    yield text(24, top - 24, "In the ONNX file: proxy normalization costs nothing", "title")
    yield from grid(top, "own")
    operators = [("Conv", "W, b", "plain"), normalizer, ("ReLU", "", "plain"), ("Conv", "W'', b''", "own")]
    yield from chain(top, operators, [*places[:3], places[4]])
    middle, y = places[3] + width / 2, top + height / 2
    yield text(middle, y - 12, "nothing left to run:", "note")
    yield text(middle, y + 22, "it is in W'' and b''", "note")


def picture() -> str:
    """The text of block.svg."""
    title = "A block with BatchNorm, the same block converted, and in the ONNX file"
    foot = text(GRID[0], TOPS["file"] + 86, "a column for each sample, a row for each channel", "note start")
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        f"<defs>{HEAD}</defs>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12" class="page"/>',
        *rows(),
        foot,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture())
