"""What is imported before there is work: counted, for a clock would count the machine's other work too."""

import subprocess
import sys
from pathlib import Path

import pytest

import pn_compiler

ROOT = Path(__file__).parent.parent
HEAVY = {"jinja2", "matplotlib", "numpy", "onnx", "onnxruntime", "rich", "torch", "tqdm", "yaml"}


def imported(code: str) -> set[str]:
    """The modules that are there when `code` has run."""
    end = "\nimport sys; sys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code + end], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["m.pt", "--norm", "grup"], []])
def test_the_command_answers_without_any_library(arguments: list[str]) -> None:
    code = "import contextlib\nfrom pn_compiler import cli\nwith contextlib.suppress(SystemExit): "
    code += f"cli.main({arguments})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('|', *sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = set(done.stdout.rpartition("|")[2].split())
    assert not names & HEAVY
    assert len([name for name in names if name.startswith("pn_compiler")]) < 20


def test_importing_the_package_imports_none_either() -> None:
    names = imported("import pn_compiler; assert 'transform' in dir(pn_compiler)")
    assert not names & HEAVY


def test_transform_imports_no_onnx_and_nothing_to_draw_with() -> None:
    names = imported("import pn_compiler; pn_compiler.transform")
    assert "torch" in names
    assert not names & (HEAVY - {"torch", "numpy", "tqdm"})


def test_all_public_names_are_there_and_no_others() -> None:
    assert set(pn_compiler.__all__) <= set(dir(pn_compiler))
    assert all(getattr(pn_compiler, name) is not None for name in pn_compiler.__all__)
    assert pn_compiler.ConversionWarning is getattr(pn_compiler, "ConversionWarning")  # noqa: B009
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pn_compiler.nothing  # noqa: B018


def test_type_checkers_see_every_public_name() -> None:
    """Each is imported for them where the lazy import finds it."""
    import ast

    tree = ast.parse(Path(pn_compiler.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen.keys() == set(pn_compiler.__all__)
    homes = {name: f"pn_compiler.{home}" for name, home in pn_compiler._HOMES.items()}
    assert {name: home for name, home in seen.items() if name != "nn"} == homes
