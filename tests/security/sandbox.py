"""Runs ``pn-compile`` on files in a process of its own, which is killed where it hangs."""

import dataclasses
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LONGEST = 10.0  # seconds of computing for a file
_HANGS = 120.0  # seconds of waiting, on a machine however busy, for the imports or for a file


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the command did with a file.

    Attributes:
        status: of its exit; None if it hung or crashed.
        seconds: of computing.
        ran: processes that were started, and whether the canary was made.
    """

    status: int | None
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    ran: tuple[str, ...] = ()

    def problem(self, expected: str | None) -> str | None:
        """What is wrong with it; `expected` is "" for a file that loads, None for one that may do either."""
        if self.status is None:
            return "hung or crashed"
        if self.ran:
            return f"ran {self.ran}"
        if self.status == 0 and not self.err:
            return f"was accepted, and {expected!r} was expected" if expected else None
        if self.seconds > LONGEST:
            return f"took {self.seconds:.1f} seconds"
        if expected == "":
            return f"was refused: {self.err}"
        return self._problem_of_refusal(expected)

    def _problem_of_refusal(self, expected: str | None) -> str | None:
        if self.status != 1 or self.out:
            return f"exit status {self.status}, {self.out!r}, {self.err!r}"
        if not re.fullmatch(r"pn-compile: error: [^\n]{10,1500}\n", self.err):
            return f"not one line: {self.err!r}"
        if re.search(r"Traceback|internal error", self.err):
            return f"traces of the inside: {self.err!r}"
        if expected is not None and not re.search(expected, self.err):
            return f"expected {expected!r}: {self.err!r}"
        return None


def outcomes(runs: Sequence[tuple[str, Sequence[str]]], folder: Path) -> Iterator[tuple[str, Outcome]]:
    """Runs the command in `folder` with each of the arguments, in one process as long as none hangs."""
    waiting = list(runs)
    while waiting:
        lines: queue.Queue[str] = queue.Queue()
        process = _start(folder, [*waiting], lines)  # read in a thread of its own
        while waiting:
            name, _ = waiting.pop(0)
            try:
                line = lines.get(timeout=_HANGS)
            except queue.Empty:
                line = ""
            if not line:
                yield name, Outcome(None)
                break
            answered, fields = json.loads(line)
            assert answered == name
            yield name, Outcome(**fields | {"ran": tuple(fields["ran"])})
        process.kill()
        process.wait()


def _start(
    folder: Path, runs: Sequence[tuple[str, Sequence[str]]], lines: "queue.Queue[str]"
) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.security.runner"],
        cwd=folder, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def feed() -> None:
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.writelines(json.dumps([name, list(arguments)]) + "\n" for name, arguments in runs)

    def collect() -> None:
        assert process.stdout is not None
        with process.stdout as pipe:
            for line in pipe:
                lines.put(line)
        lines.put("")

    for work in (feed, collect):
        threading.Thread(target=work, daemon=True).start()
    return process
