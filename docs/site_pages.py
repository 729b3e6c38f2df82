"""A hook of mkdocs: the pages at the root, README.md the first, and the notebooks are pages of the site."""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

#: at the root of the repository -> on the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "LICENSE": "LICENSE",
    "CITATION.cff": "CITATION.cff",
}
NOTEBOOK = re.compile(r"examples/notebooks/(\w+)\.ipynb")
LINK = re.compile(r"(\]\(|(?:src|srcset|href)=\")([^)\"#\s]+)")


def place_on_site(target: str) -> str:
    """Where a link from the root of the repository leads on the site."""
    path = posixpath.normpath(target)
    return NOTEBOOK.sub(r"notebooks/\1.md", PAGES.get(path, path.removeprefix("docs/")))


def as_page(notebook: Path) -> str:
    """The text and the code of a notebook."""
    cells = json.loads(notebook.read_text())["cells"]
    blocks = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    title, *rest = [f"```python\n{source}\n```" if code else source for source, code in blocks]
    origin = f"*This is the notebook `examples/notebooks/{notebook.name}`.*"
    return "\n\n".join([title, origin, *rest]).replace("](../../docs/", "](../")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for source, page in PAGES.items():
        text = (root / source).read_text()
        if source.endswith(".md"):
            text = text.replace("[docs/", "[")
            text = LINK.sub(
                lambda match: match[1] + (match[2] if ":" in match[2] else place_on_site(match[2])), text
            )
        files.append(File.generated(config, page, content=text))
    for notebook in (root / "examples" / "notebooks").glob("*.ipynb"):
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=as_page(notebook)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Pages in docs/ may link to those at the root."""
    names = "|".join(map(re.escape, PAGES))
    return re.sub(rf"\]\(\.\./({names})", lambda match: f"]({PAGES[match[1]]}", markdown)
