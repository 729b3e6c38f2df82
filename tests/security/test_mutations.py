"""Randomly damaged files; `python -m tests.security.mutations` does more."""

from pathlib import Path

import pytest

from tests.security import mutations


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.chdir(tmp_path)
    assert not list(mutations.problems(count, 0, tmp_path))


def test_damage_depends_on_the_seed_alone() -> None:
    assert dict(mutations.mutants(range(6), 3)) == dict(mutations.mutants(range(6), 3))
    contents = [content for _, content in mutations.mutants(range(30), 3)]
    assert len(set(contents)) == 30
