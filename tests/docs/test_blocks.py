"""The blocks of code in README.md and docs/ run as a reader pastes them, and print what the pages show.

The Python blocks of some pages run in `make test`, the others in `make test-all`. What cannot run here says
so in the page, right above the block.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests import zoo
from tests.docs import run_page
from tests.docs.blocks import LANGUAGES, PAGES, ROOT, Block, blocks_of, given_in
from tests.docs.given import GIVEN
from tests.docs.workspace import enter, run_as_a_reader

RUNNING = [page for page in PAGES if any(block.runs for block in blocks_of((ROOT / page).read_text()))]
QUICK = ["README.md", "docs/deploy.md", "docs/distillation.md", "docs/static.md", "docs/training.md"]


@pytest.mark.parametrize("page", QUICK)
def test_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    zoo.torchvision()  # importable beside torch for CPUs
    enter(tmp_path, page, monkeypatch)
    blocks = [block for block in blocks_of((ROOT / page).read_text()) if block.language != "bash"]
    assert run_page.run_blocks(blocks, page) == []


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING)
def test_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    enter(tmp_path, page, monkeypatch)
    wrong = run_as_a_reader(page)
    assert not wrong, wrong


def test_no_block_can_install_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, "README.md", monkeypatch)
    command = ["make", "--no-print-directory", "--dry-run", "demo"]
    planned = subprocess.run(command, capture_output=True, text=True, check=True)
    assert planned.stdout == ".venv/bin/python examples/digits.py\n"
    shown = subprocess.run([".venv/bin/pip", "config", "debug"], capture_output=True, text=True, check=True)
    assert "PIP_DRY_RUN='1'" in shown.stdout


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    text = (ROOT / page).read_text()
    blocks = blocks_of(text)
    assert text.count("```") == 2 * len(blocks), "a fence that does not end, or has options"
    assert {block.language for block in blocks} <= LANGUAGES
    marks = re.findall(r"^ *\*Not run by the tests: ", text, re.MULTILINE)
    assert len(marks) == sum(bool(block.reason) for block in blocks), "a mark that stands above no block"
    assert set(given_in(text)) <= GIVEN.keys()


def test_a_wrong_page_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
```python
x = 1
```

*Not run by the tests: it has no end.*

```bash
sleep infinity
```

```python
print("epoch", x, 0.25)
```

```output
epoch 1 0.26
epoch 1 0.55
epoch one 0.25
```

```bash
false
echo "this is not reached"
```

```python
raise AssertionError("nor this")
```
"""
    monkeypatch.chdir(tmp_path)
    assert run_page.run_blocks(blocks_of(text), "page") == [
        "page:17: not printed: epoch 1 0.55",
        "page:17: not printed: epoch one 0.25",
        "page:23: failed",
    ]


def test_blocks_in_lists_lose_their_indentation() -> None:
    text = "- one\n\n  ```python\n  if True:\n      pass\n  ```\n"
    assert blocks_of(text) == [Block("python", "if True:\n    pass\n", 4, "")]
