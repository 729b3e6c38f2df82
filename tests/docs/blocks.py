"""The code blocks of a page: which of them run, and why the others do not."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # a page runs in a folder with links to it
PAGES = sorted(
    str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md")
)

#: what a fence may say: code that runs, what the code before it printed, and what is neither
LANGUAGES = {"python", "bash", "output", "text", "yaml"}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"\*Not run by the tests: ([^*]+)\.\*\s*\Z")
GIVEN = re.compile(r"<!-- given: (.+?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of its first line of code, from 1.
        reason: why the page says that the tests do not run it; empty for those that they do.
    """

    language: str
    code: str
    line: int
    reason: str

    @property
    def runs(self) -> bool:
        return self.language in ("python", "bash") and not self.reason


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = []
    for match in FENCE.finditer(text):
        indent, language, code = match.groups()
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        mark = NOT_RUN.search(text[: match.start()])
        line = text[: match.start(3)].count("\n") + 1
        found.append(Block(language, "\n".join(lines) + "\n", line, mark[1] if mark else ""))
    return found


def given_in(text: str) -> list[str]:
    """The files of the reader's own that a page speaks of, which the tests have to make."""
    return [name for match in GIVEN.finditer(text) for name in match[1].split(", ")]
