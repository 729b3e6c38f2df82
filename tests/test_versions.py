"""The versions that docs/versions.md names are those of the files that install them."""

import re
from pathlib import Path

import pytest
import typing_extensions

from pn_compiler.proxies.proxies import is_internal

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
ROOT = Path(__file__).parent.parent


def pins(name: str) -> dict[str, str]:
    """Package -> version of a file of constraints."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE))


def bounds() -> dict[str, str]:
    """Package -> lower bound, of users' packages and extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for name in extras if name != "dev" for text in extras[name])]
    found = {re.match(r"[\w-]+", text)[0]: text.partition(">=")[2] for text in texts}
    return {"Python": project["requires-python"].removeprefix(">="), **found}


def rows() -> dict[str, tuple[str, list[str]]]:
    """Package -> lower bound and tested versions, as documented."""
    text = (ROOT / "docs" / "versions.md").read_text()
    found = re.findall(r"^\| ([\w-]+) \| ([\d.]+|-) \| ([\d., ]+) \|$", text, re.MULTILINE)
    return {package: (bound, tested.split(", ")) for package, bound, tested in found}


def test_the_table_has_the_lower_bounds_and_what_the_tests_run_with() -> None:
    declared, installed = bounds(), pins("constraints.txt") | pins("requirements-models.txt")
    assert {
        "Python",
        "torch",
        "onnx",
        "onnxruntime",
        "numpy",
        "torchvision",
        "timm",
        "opacus",
    } <= rows().keys()
    for package, (bound, tested) in rows().items():
        assert bound == declared.get(package, "-"), package
        assert tested[-1] == installed.get(package, tested[-1]), package


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    declared = bounds()
    oldest = pins("constraints-oldest.txt")
    assert {
        "torch",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "onnx-ir",
        "numpy",
        "protobuf",
        "pyyaml",
    } <= oldest.keys()
    for package in oldest.keys() & declared.keys():
        assert re.fullmatch(rf"{re.escape(declared[package])}(\.0)*", oldest[package]), package


def test_what_python_3_10_takes_from_typing_extensions_is_not_the_users_code() -> None:
    """It catches ValueErrors, which in a traced forward would be refused."""
    assert is_internal(vars(typing_extensions))
