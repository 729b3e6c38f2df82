"""What a user must know about a conversion, as a Python warning that points to the user's own line."""

import sys
import warnings
from collections.abc import Sequence

from pn_compiler.base.diagnostics import CODES, Diagnostic

_NAMED = 3  # sites in a line
#: Notes that are no refusals, yet change what a converted network does, or how well.
_TELLING = frozenset({"PN110", "PN112", "PN113", "PN209"})
_HARMLESS = frozenset({"PN103"})  # refused, and nothing depends on the batch


class ConversionWarning(UserWarning):
    """A conversion has left something as it was, or the result behaves differently.

    Attributes:
        diagnostics: what it is about; each has a code of docs/conversion.md.
    """

    def __init__(self, message: str = "", diagnostics: tuple[Diagnostic, ...] = ()) -> None:
        super().__init__(message)
        self.diagnostics = diagnostics


def must_know(notes: Sequence[Diagnostic]) -> tuple[Diagnostic, ...]:
    """Those of `notes` that a user must not miss: refusals, and what changes how the result behaves."""
    return tuple(
        note
        for note in notes
        if note.code in _TELLING or (note.severity == "warning" and note.code not in _HARMLESS)
    )


def gathered(notes: Sequence[Diagnostic]) -> list[str]:
    """A line for each code of `notes`, however many sites it is about."""
    by_code: dict[str, list[Diagnostic]] = {}
    for note in notes:
        by_code.setdefault(note.code, []).append(note)
    return [_line(same) for same in by_code.values()]


def _line(same: Sequence[Diagnostic]) -> str:
    first = same[0]
    if len(same) == 1:
        return str(first)
    hint = f" ({first.hint})" if first.hint else ""
    return (
        f"{first.code} at {len(same)} sites ({listed([n.site for n in same])}): {CODES[first.code][1]}{hint}"
    )


def listed(names: Sequence[str], most: int = _NAMED) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def warn(notes: Sequence[Diagnostic]) -> None:
    """Warns once of what there is to know among `notes`, in the name of the code that called this package."""
    known = must_know(notes)
    if known:
        lines = "\n  ".join(gathered(known))
        message = f"what to know of this conversion:\n  {lines}\nall of it: print(pn_compiler.sites(result))"
        warnings.warn(ConversionWarning(message, known), stacklevel=_level_of_the_caller())


def _level_of_the_caller() -> int:
    """How many frames above `warn` the first one is that does not belong to this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "pn_compiler":
        frame, level = frame.f_back, level + 1
    return level
