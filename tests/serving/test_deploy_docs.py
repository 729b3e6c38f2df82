"""What docs/deploy.md shows in Python runs as it stands, and the tests that it names exist."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.processes import ROOT

TEXT = (ROOT / "docs" / "deploy.md").read_text()


def block(heading: str) -> str:
    """The Python code below a heading."""
    section = TEXT[TEXT.index(f"{heading}\n") :]
    code = section[section.index("```python\n") + len("```python\n") :]
    return code[: code.index("```")]


@pytest.mark.parametrize("heading", ["### onnxruntime, in the process", "### OpenVINO"])
def test_in_the_process(repository: Path, tmp_path: Path, heading: str) -> None:
    shutil.copytree(repository, tmp_path / "model_repository")
    code = block(heading)
    assert len(code.splitlines()) <= 15
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert 0 <= float(done.stdout) < 1e-5


def test_commands_are_few_and_tests_exist() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 2
    assert all(len(each.splitlines()) <= 15 for each in blocks)
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", TEXT)):
        assert f"def {name}(" in sources
