"""Links between the pages, to files and to headings, and the site's menu. Nothing is asked of a network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pn_compiler
from tests.docs.blocks import FENCE, PAGES, ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
CODE = re.compile(r"`[^`\n]*`")


def headings(text: str) -> set[str]:
    """The anchors of a page, as GitHub and the site make them."""
    found: set[str] = set()
    for line in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line.lower())
        anchor = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        number = sum(
            other == anchor or re.fullmatch(rf"{re.escape(anchor)}-\d+", other) is not None for other in found
        )
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def dead_links(page: Path, root: Path) -> list[str]:
    """Links of a page that lead to no file of the repository, or to no heading of one."""
    text = CODE.sub("", FENCE.sub("", page.read_text()))
    dead = []
    for match in LINK.finditer(text):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = Path(os.path.normpath(page.parent / name)) if name else page
        known = file.exists() and file.is_relative_to(root)
        if not known or (anchor and (file.suffix != ".md" or anchor not in headings(file.read_text()))):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert dead_links(ROOT / page, ROOT) == []


def test_a_dead_link_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(
        "# Two words, `code`\n\n```bash\n# not a heading\n```\n\n# Again\n# Again\n"
    )
    page = tmp_path / "page.md"
    good = ["other.md", "other.md#two-words-code", "other.md#again-1", "https://example.org", "#here"]
    bad = ["no.md", "other.md#not-a-heading", "other.md#again-2", "#there", "../outside.md", "other.md#Again"]
    (tmp_path.parent / "outside.md").touch()
    page.write_text("# Here\n" + "\n".join(f"[a]({link}) `[b](code.md)`" for link in good + bad))
    assert dead_links(page, tmp_path) == bad


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose slugs are a Python object."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def test_every_page_is_in_the_menu_of_the_site() -> None:
    menu = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    named = [page for section in menu for value in section.values() for page in pages_of(value)]
    assert len(named) == len(set(named))
    expected = {page.removeprefix("docs/").replace("README.md", "index.md") for page in PAGES}
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}
    assert set(named) == expected | notebooks


def pages_of(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    assert isinstance(entry, list)
    return [page for each in entry for value in each.values() for page in pages_of(value)]


def test_the_reference_has_all_public_names() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    names = set(re.findall(r"^::: pn_compiler\.(\w+)$", page, re.MULTILINE))
    assert names == {*pn_compiler.__all__, "testing"}


def test_pictures_are_what_their_scripts_draw(tmp_path: Path) -> None:
    scripts = list((ROOT / "docs" / "pictures").glob("draw_*.py"))
    assert scripts
    for script in scripts:
        copy = tmp_path / script.name
        copy.write_text(script.read_text())
        subprocess.run([sys.executable, copy], check=True)
        name = script.stem.removeprefix("draw_") + ".svg"
        assert (tmp_path / name).read_text() == script.with_name(name).read_text(), f"python {script}"
