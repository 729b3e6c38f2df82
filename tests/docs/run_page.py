"""Runs the blocks of a page in the current folder: ``python -m tests.docs.run_page PAGE``.

Python blocks share one namespace. Each bash block is a shell of its own, which ends at the first command that
fails. An ``output`` block must be what the block before it printed.
"""

import contextlib
import io
import math
import re
import subprocess
import sys
import time
import traceback
from typing import Any

from tests import zoo
from tests.docs.blocks import ROOT, Block, blocks_of

NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


def run(block: Block, page: str, namespace: dict[str, Any]) -> str:
    """What the block printed.

    Raises:
        Exception: what the block raised, or a CalledProcessError.
    """
    if block.language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", block.code]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            sys.stdout.write(done.stdout)
            done.check_returncode()
        return done.stdout
    padded = "\n" * (block.line - 1) + block.code  # so that a traceback has the lines of the page
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(padded, page, "exec"), namespace)
    return printed.getvalue()


def differences(shown: str, printed: str) -> list[str]:
    """Lines that a page shows and the code did not print. Numbers may differ a little between machines."""
    lines = printed.splitlines()
    return [line for line in shown.splitlines() if not any(alike(line, other) for other in lines)]


def alike(shown: str, printed: str) -> bool:
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(close(a, b) for a, b in pairs)


def close(shown: str, printed: str) -> bool:
    """Within a tenth, or three units of the last digit that is shown."""
    digits = shown.replace(",", "").partition("e")[0].partition(".")[2]
    unit = 10.0 ** -len(digits) if "e" not in shown else 0.0
    a, b = (float(text.replace(",", "")) for text in (shown, printed))
    return math.isclose(a, b, rel_tol=0.1, abs_tol=3 * unit)


def run_blocks(blocks: list[Block], page: str) -> list[str]:
    """What is wrong with a page: one line for each line of output that differs, one for a failed block."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    wrong, printed = [], ""
    for block in blocks:
        if block.language == "output":
            missing = differences(block.code, printed)
            wrong += [f"{page}:{block.line}: not printed: {line}" for line in missing]
            if missing:
                sys.stdout.write(f"{printed}\n")
        if block.runs:
            start = time.perf_counter()
            try:
                printed = run(block, page, namespace)
            except Exception:
                traceback.print_exc()
                return [*wrong, f"{page}:{block.line}: failed"]
            sys.stdout.write(f"{page}:{block.line}: {time.perf_counter() - start:.1f} s\n")
    return wrong


if __name__ == "__main__":
    zoo.torchvision()  # importable beside torch for CPUs
    problems = run_blocks(blocks_of((ROOT / sys.argv[1]).read_text()), sys.argv[1])
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    sys.exit(bool(problems))
