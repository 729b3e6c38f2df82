"""Runs ``pn-compile`` on many files in one process and reports on each. Started by `tests.security.sandbox`.

Reads lines of JSON [name, arguments] from the standard input and answers each with one line.
"""

import contextlib
import gc
import io
import json
import sys
import time
from pathlib import Path

import torch

from pn_compiler import cli, compilation, export  # noqa: F401  # imports are not what is timed

_PROCESSES = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.spawn",
    "pty.spawn",
)


def run(arguments: list[str], started: list[str]) -> dict[str, object]:
    """What the command answers, how long it takes and whether it ran anything."""
    started.clear()
    out, err = io.StringIO(), io.StringIO()
    begin = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(arguments)
    canary = Path("canary").exists()
    if canary:
        Path("canary").unlink()
    return {
        "status": status,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "seconds": time.process_time() - begin,
        "ran": [*started, *["canary"] * canary],
    }


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the collector need not go through what was imported
    started: list[str] = []
    sys.addaudithook(lambda event, arguments: started.append(event) if event.startswith(_PROCESSES) else None)
    answers = sys.stdout
    for line in sys.stdin:
        name, arguments = json.loads(line)
        answers.write(json.dumps([name, run(arguments, started)]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
