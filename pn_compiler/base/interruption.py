"""Ctrl-C and SIGTERM at any moment: one line, exit status 130, and nothing half written."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

STATUS = 130
_WRITING = ("write", "repository")  # stages of a run


class Interruption:
    """Whether the user has stopped the command.

    While libraries are imported nothing has been written, and their imports may swallow or convert a
    KeyboardInterrupt: then the process ends at once. Afterwards a KeyboardInterrupt unwinds, so that
    temporary files are removed.
    """

    def __init__(self) -> None:
        self.requested = False
        self.starting = True
        self.writing = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self.starting:
            with contextlib.suppress(OSError):
                os.write(2, b"pn-compile: error: interrupted; nothing was written\n")
            os._exit(STATUS)
        raise KeyboardInterrupt

    def enter(self, stage: str) -> None:
        """Notes what begins, after a `check`."""
        self.check()
        self.writing = self.writing or stage in _WRITING

    def check(self) -> None:
        """Raises KeyboardInterrupt again if a library swallowed it."""
        if self.requested:
            raise KeyboardInterrupt

    @property
    def message(self) -> str:
        done = "files are as they were, or whole" if self.writing else "nothing was written"
        return f"interrupted; {done}"


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Lets signals stop the block; in other threads than the first they are left as they are."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        interruption.starting = False
        yield interruption
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, interruption.handle) for number in numbers}
    report = sys.unraisablehook

    def quietly(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            report(unraisable)

    sys.unraisablehook = quietly
    try:
        yield interruption
    finally:
        exec("")  # Python would end with the signal if the exception crossed code that exec made of a text
        sys.unraisablehook = report
        for number, handler in previous.items():
            signal.signal(number, handler)
