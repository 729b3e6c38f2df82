"""The package as it is shipped: what the wheel holds, and that it works outside the repository."""

import importlib.metadata
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import tomllib
import torch
from torch import nn

import pn_compiler
from pn_compiler.base.diagnostics import CODES
from pn_compiler.testing import randomize_batch_norms

ROOT = Path(__file__).parent.parent
TOP = ("pn_compiler", "passes", "export")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_listed() -> None:
    folders = [p.parent.relative_to(ROOT) for top in TOP for p in (ROOT / top).rglob("__init__.py")]
    packages = [".".join(folder.parts) for folder in folders]
    expected = {name if name.startswith("pn_compiler") else f"pn_compiler.{name}" for name in packages}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_public_names() -> None:
    expected = {"transform", "sites", "fold", "export_onnx", "compile", "proxy_moments", "nn"}
    assert expected <= set(pn_compiler.__all__)
    assert all(hasattr(pn_compiler, name) for name in pn_compiler.__all__)
    assert hasattr(pn_compiler.nn, "ProxyNormAct")


def test_importing_is_light() -> None:
    code = "import sys, pn_compiler; print([m for m in ('onnx', 'onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_folder_map_is_the_tree() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Folder map") : text.index("## How to add a pass")]
    rows = re.findall(r"^\| `([\w/]+)/` \| .* \| (.*)\|$", section, re.MULTILINE)
    documented = {folder: sorted(re.findall(r"`(\w+)`", files)) for folder, files in rows}
    actual: dict[str, list[str]] = {"tests": []}
    for top in (*TOP, "examples", "benchmarks"):
        for init in (ROOT / top).rglob("__init__.py"):
            names = (module.stem for module in init.parent.glob("*.py"))
            actual[str(init.parent.relative_to(ROOT))] = sorted(n for n in names if not n.startswith("__"))
    assert documented == actual


def test_every_diagnostic_is_documented() -> None:
    documented = (ROOT / "docs" / "conversion.md").read_text()
    for code, (severity, _) in CODES.items():
        assert f"| {code} | {severity} |" in documented


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        original, copy = ROOT / name, source / name
        if original.is_symlink() or original.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            if original.is_symlink():
                copy.symlink_to(original.readlink())
            else:
                copy.write_bytes(original.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_one_package_and_all_of_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {"pn_compiler"}
    assert {
        "pn_compiler/passes/__init__.py",
        "pn_compiler/export/__init__.py",
        "pn_compiler/repository/templates/ray_app.py",
        "pn_compiler/repository/templates/ort_runtime.py",
        "pn_compiler/py.typed",
    } <= set(names)


def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment that sees the dependencies installed here, but not this repository."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    here = Path(torch.__file__).parent.parent
    (site_packages / "dependencies.pth").write_text(f"{here}\n")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    torch.save(randomize_batch_norms(net), tmp_path / "model.pt")
    command = tmp_path / "venv" / "bin" / "pn-compile"
    version = subprocess.run([command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    first, second = version.stdout.splitlines()
    assert first == f"pn-compile {PROJECT['project']['version']}"
    assert f"torch {importlib.metadata.version('torch')}, onnx " in second
    subprocess.run(
        [command, "model.pt", "-o", "model.onnx", "--input-shape", "1,3,8,8"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "model.onnx").exists()
    where = subprocess.run(
        [python, "-c", "import pn_compiler; print(pn_compiler.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(tmp_path)
