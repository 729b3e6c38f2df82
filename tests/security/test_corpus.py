"""Hostile and broken files: no code of theirs runs, nothing hangs, and each is refused in one line."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.archive_cases import archive_cases
from tests.security.files import Case
from tests.security.inert_cases import inert_cases
from tests.security.pickle_cases import pickle_cases
from tests.security.program_cases import program_cases
from tests.security.sandbox import ROOT, outcomes
from tests.security.saved_cases import saved_cases


@functools.cache
def corpus() -> tuple[Case, ...]:
    return *archive_cases(), *pickle_cases(), *inert_cases(), *program_cases(), *saved_cases()


def write(case: Case, folder: Path) -> None:
    path = folder / case.name
    if isinstance(case.content, bytes):
        path.write_bytes(case.content)
    else:
        case.content(path)


def test_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases = {case.name: case for case in corpus()}
    assert len(cases) == len(corpus()) >= 150
    for case in cases.values():
        write(case, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    runs = [(name, case.arguments()) for name, case in cases.items()]
    found = {name: outcome.problem(cases[name].expected) for name, outcome in outcomes(runs, tmp_path)}
    problems = {name: problem for name, problem in found.items() if problem}
    assert not problems, "\n".join(f"{name}: {problem}" for name, problem in problems.items())
    assert len(found) == len(cases)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "out.onnx") == before


@pytest.mark.parametrize("name", ["sample_inputs.pt2", "placeholder_call.pt2", "_modules_source.pt"])
def test_the_command_itself(tmp_path: Path, name: str) -> None:
    write(next(case for case in corpus() if case.name == name), tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pn_compiler.cli", name, "-o", "out.onnx"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert [path.name for path in tmp_path.iterdir()] == [name]
