"""Hostile and broken files: no code of theirs runs, nothing hangs, and each is refused in one line."""

from pathlib import Path

import pytest

from tests.security.archive_cases import archive_cases
from tests.security.files import Case
from tests.security.pickle_cases import pickle_cases
from tests.security.program_cases import program_cases
from tests.security.sandbox import outcomes


def corpus() -> list[Case]:
    return [*archive_cases(), *pickle_cases(), *program_cases()]


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
