"""Hostile and broken samples: refused in one line, without running or blocking."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.data.image_folder import read_image
from pn_compiler.data.sources import load_batches
from tests.security.files import CANARY, Payload


def _npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header


def _bytes(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _npz(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", content)
    return file.getvalue()


FILES: dict[str, bytes] = {
    "objects.npy": _npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n")
    + pickle.dumps([Payload(os.system, CANARY)]),
    "bare.npy": pickle.dumps(Payload(os.system, CANARY)),
    "header.npy": _npy(b"__import__('os').system('touch canary')\n"),
    "giant.npy": _npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}\n"),
    "negative.npy": _npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}\n"),
    "records.npy": _bytes(np.zeros(3, [("a", "f4")])),
    "text.npy": _bytes(np.array(["a", "b"])),
    "cut.npy": _bytes(np.zeros((4, 3)))[:-8],
    "empty.npy": b"",
    "objects.npz": _npz(
        _npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n") + pickle.dumps([1])
    ),
    "giant.npz": _npz(_npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,)}\n")),
    "cut.npz": _npz(_bytes(np.zeros(3)))[:60],
    "cut.safetensors": (100).to_bytes(8, "little") + b"{",
    "giant.safetensors": (2**60).to_bytes(8, "little") + b"{}",
    "text.safetensors": b"hello, I am text, not weights",
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(FILES[name])
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")) as caught:
        list(load_batches(name, nn.Linear(3, 2)))
    assert "\n" not in str(caught.value)
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.symlink_to("nothing"), "No such file"),
    ],
)
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    for name in ("a.npy", "b.npz", "c.safetensors"):
        make(tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            load_batches(tmp_path / name, nn.Linear(3, 2))
    (tmp_path / "images").mkdir()
    make(tmp_path / "images" / "a.png")
    with pytest.raises(ConfigError, match=message):
        load_batches(tmp_path / "images", nn.Conv2d(3, 2, 1))


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(canary) (w) file\n%%EOF\n"
    )
    with pytest.raises(ConfigError, match="not an image"):
        read_image(str(path))


def test_folders_that_contain_themselves(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
    with pytest.raises(ConfigError, match="holds no images"):
        load_batches(tmp_path / "images", nn.Conv2d(3, 2, 1))
