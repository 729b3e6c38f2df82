"""A file to write into a repository, and where that is."""

from pathlib import Path

import pytest

import pn_compiler
from tests.repository.common import IMAGES, network


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "net.onnx"
    pn_compiler.export_onnx(network(), path, IMAGES)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model_repository"
