"""A folder in which the blocks of a page run: like a checkout after `make`, with the reader's own files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, given_in
from tests.docs.given import GIVEN

#: of the repository; what the blocks write lands beside the links
LINKED = (
    *("pn_compiler", "passes", "export", "examples", "benchmarks", "tests"),
    *("Makefile", "pyproject.toml", "constraints.txt", "requirements-models.txt"),
)


def enter(folder: Path, page: str, patch: pytest.MonkeyPatch) -> None:
    """Makes `folder` one in which the page can run, and the current one; caches lie in it, too."""
    environment = {
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PIP_DRY_RUN": "1",  # no block may change the environment of the tests
        "TORCH_HOME": str(folder / "torch"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    for name, value in environment.items():
        patch.setenv(name, value)
    patch.chdir(folder)
    patch.syspath_prepend(folder)
    for name in LINKED:
        Path(name).symlink_to(ROOT / name)
    link_environment(Path(".venv"))
    for name in given_in((ROOT / page).read_text()):
        GIVEN[name](Path(name))


def link_environment(folder: Path) -> None:
    """Links to the environment of the tests, with a stamp of its own: make has nothing left to install."""
    folder.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    (folder / ".installed").touch()


def run_as_a_reader(page: str) -> str:
    """Runs all blocks of a page in a process of its own. Returns what went wrong, and what was printed."""
    command = [sys.executable, "-m", "tests.docs.run_page", page]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout if done.returncode else ""
