"""Ends the processes of Ray tests by pid, even if pytest is killed.

Ray puts its processes into sessions of their own: the environment, which they inherit, tells whose they are.
"""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

TESTS = "PN_COMPILER_RAY_TESTS"  # in the environment of all that a run of tests starts


def watch() -> None:
    """Marks all processes that this one starts from now on, and has them killed as soon as it is gone."""
    mark = uuid.uuid4().hex
    watchdog = subprocess.Popen(
        [sys.executable, __file__, mark], stdin=subprocess.PIPE, start_new_session=True
    )  # unmarked, and reads the end of its input when this process ends, however it does
    os.environ[TESTS] = mark
    atexit.register(watchdog.communicate)


def marked(variable: str, mark: str, title: str = "") -> list[int]:
    """Processes that were started with `mark` in `variable`, and whose command line holds `title`."""
    parents, mine = {}, set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if f"{variable}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                mine.add(int(path.name))
    while children := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= children  # agents of Ray write their title over their environment
    found = []
    for pid in mine:
        with contextlib.suppress(OSError):
            if title.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def kill(
    variable: str, mark: str, process: "subprocess.Popen[str] | subprocess.Popen[bytes] | None" = None
) -> None:
    """SIGKILL to all processes with `mark` in `variable`; waits for `process`, a child among them."""
    deadline = time.monotonic() + 20
    while pids := marked(variable, mark):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process is not None:
            process.poll()  # or it stays a zombie
        assert time.monotonic() < deadline, f"processes that do not end: {pids}"
        time.sleep(0.05)
    if process is not None:
        process.wait()


if __name__ == "__main__":
    sys.stdin.read()
    kill(TESTS, sys.argv[1])
