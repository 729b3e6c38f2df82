"""Progress bars on a terminal, drawn by rich; nothing in a pipe or a notebook."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

Advance = Callable[[str], None]  # one step is done; the text describes what comes next, "" as before
_shown: "list[Progress]" = []  # the display that is on the terminal: there can be one at a time


@contextlib.contextmanager
def bar(title: str, total: int | None = None, done: int = 0) -> Iterator[Advance]:
    """A bar for `total` steps, under those that are there; the block gets a function that advances it."""
    with _display() as progress:
        if progress is None:
            yield lambda text: None
            return
        task = progress.add_task(title, total=total, completed=done)

        def advance(text: str = "") -> None:
            progress.update(task, advance=1, description=text or title)

        try:
            yield advance
        finally:
            progress.remove_task(task)


def track(items: Iterable[T], title: str) -> Iterator[T]:
    """Iterates over `items` under a bar."""
    with bar(title, len(items) if isinstance(items, Sized) else None) as advance:
        for item in items:
            yield item
            advance("")


@contextlib.contextmanager
def _display() -> "Iterator[Progress | None]":
    """The display on the terminal; None where there is no terminal, or other code draws on it."""
    if _shown or not _on_terminal():
        yield _shown[0] if _shown else None
        return
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    progress = Progress(*columns, console=Console(file=sys.stderr, highlight=False), transient=True)
    try:
        progress.start()
    except LiveError:
        yield None
        return
    _shown.append(progress)
    try:
        yield progress
    finally:
        _shown.clear()
        progress.stop()


def _on_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # it is closed
        return False
