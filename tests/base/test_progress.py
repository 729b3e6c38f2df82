"""Bars of rich on a terminal, nothing elsewhere."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from pn_compiler.base.progress import bar, track

ROOT = Path(__file__).parent.parent.parent
NESTED = """
from pn_compiler.base.progress import bar, track
with bar("whole [b]", 2) as advance:
    for _ in track([1, 2, 3], "part"):
        pass
    advance("stage")
print("done")
"""


def on_a_terminal(code: str, **environment: str) -> str:
    """What `code` writes to a terminal, both streams."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"} | environment
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        written = b"".join(iter(lambda: _read(ours), b""))
        os.close(ours)
    assert process.returncode == 0, written
    return written.decode()


def _read(terminal: int) -> bytes:
    """Nothing once the other end is closed."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_nothing_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    with bar("title", 3) as advance:
        assert list(track(iter("ab"), "part")) == ["a", "b"]
        advance("next")
    assert capfd.readouterr() == ("", "")


def test_nested_bars_on_a_terminal() -> None:
    shown = on_a_terminal(NESTED)
    assert "whole [b]" in shown
    assert shown.rstrip().endswith("done")
    assert "\x1b[?25h" in shown  # the cursor is back


def test_a_terminal_without_cursor_shows_none() -> None:
    assert on_a_terminal(NESTED, TERM="dumb").split() == ["done"]


def test_an_error_ends_the_bars() -> None:
    with pytest.raises(KeyError), bar("title", 1):
        raise KeyError
    with bar("title", 1) as advance:
        advance("")
