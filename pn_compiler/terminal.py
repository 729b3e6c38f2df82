"""What `pn-compile` prints: in colours and columns on a terminal, as plain text in a pipe."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from pn_compiler.base import progress
from pn_compiler.base.errors import ConfigError, printable
from pn_compiler.base.tables import format_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from pn_compiler.export.summary import Line

_STAGES = 16  # of a whole run, for the progress bar
_STYLES = {"": "", "good": "green", "warning": "yellow", "next": "bold cyan"}


def write(text: str) -> None:
    """To the standard output, which may be a pipe that nobody reads any more.

    Raises:
        ConfigError: it takes nothing, for example because the disk is full.
    """
    try:
        if sys.stdout is not None:  # which it is if the caller closed it
            encoding = sys.stdout.encoding or "utf-8"  # names of files may be beyond it
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again at its end
        if not isinstance(error, BrokenPipeError):
            raise ConfigError(f"cannot print the result: {error.strerror}") from error


def write_error(message: str) -> None:
    """One line to the standard error."""
    head = "pn-compile: error:"
    if _is_terminal(sys.stderr):
        from rich.text import Text

        head = _rendered(Text(head, style="bold red")).rstrip()
    with contextlib.suppress(OSError, ValueError):  # nobody listens
        sys.stderr.write(f"{head} {printable(message)}\n")
        sys.stderr.flush()


def lines(summary: "Sequence[Line]") -> str:
    """A summary: a column of labels, and one of texts."""
    if not _is_terminal(sys.stdout):
        return "\n".join(printable_lines(str(line)) for line in summary)
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for line in summary:
        style = _STYLES[line.mood]
        grid.add_row(_cell(line.label, style or "bold"), _cell(line.text, style))
    return _rendered(grid)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table; on a terminal, long cells are wrapped."""
    if not _is_terminal(sys.stdout):
        return printable_lines(format_table(header, rows))
    from rich.table import Table

    shown = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in header:
        shown.add_column(_cell(name), overflow="fold", no_wrap=name != header[-1])
    for row in rows:
        shown.add_row(*map(_cell, row))
    return _rendered(shown)


def printable_lines(text: str) -> str:
    """`text` without what would steer a terminal: names of modules come from files."""
    return "\n".join(_without_controls(line) for line in text.split("\n"))


def _without_controls(line: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def _cell(text: str, style: str = "") -> "Text":
    """A cell that is no markup, whatever is in its brackets."""
    from rich.text import Text

    return Text(printable_lines(text), style=style)


def _rendered(what: "RenderableType") -> str:
    """As a terminal shows it, with colours unless NO_COLOR is set."""
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip("\n").split("\n"))


def _is_terminal(stream: IO[Any] | None) -> bool:
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # it is closed
        return False


@contextlib.contextmanager
def stages(enter: Callable[[str], None], *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, nothing in a pipe; the block gets a function that names each stage to `enter`."""
    with contextlib.nullcontext(lambda text: None) if quiet else progress.bar("start", _STAGES) as advance:

        def say(stage: str) -> None:
            enter(stage)
            advance(stage)

        yield say
