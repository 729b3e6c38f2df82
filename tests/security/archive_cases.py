"""Files that are no archive, and archives that torch does not write."""

import io
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from tests.security.files import COMPILE, LOADS, Case, changed, entries, network, packed, program, saved

_NO_MODEL = "is not a model saved by torch.save or torch.export|is damaged"
_DAMAGED = "is damaged"
_OTHER = "is a zip archive but not a model"


def archive_cases() -> Iterator[Case]:
    yield from _good_files()
    yield from _other_formats()
    yield from _no_files()
    yield from _cut_short()
    yield from _odd_archives()


def _good_files() -> Iterator[Case]:
    good = saved(network())
    yield Case("good.pt", good, LOADS)
    yield Case("good_repacked.pt", packed(entries(good)), LOADS)
    yield Case("good.pt2", program(), LOADS, (), COMPILE)
    yield Case("good_named_pt.pt", program(), LOADS, ())
    yield Case("good_twins.pt2", program(twins=True), LOADS, (), COMPILE)
    yield Case(
        "good_link.pt",
        lambda path: (Path("target.bin").write_bytes(good), path.symlink_to("target.bin")),
        LOADS,
    )
    state = saved(network().state_dict())
    yield Case("state_dict.pt", state, "state_dict, parameters without the network")
    nested = saved({"epoch": 1, "state_dict": network().state_dict(), "best": 0.5, "lr": [1, 2]})
    for name, content in (("bare", state), ("nested", nested)):
        yield Case(
            f"state_dict_{name}.ckpt",
            content,
            LOADS,
            ("--arch", "tests.security.files:network", "--input-shape", "1,3,8,8"),
        )
    yield Case("double.pt", changed(lambda net: net.double()), LOADS)


def _other_formats() -> Iterator[Case]:
    archive = io.BytesIO()
    np.savez(archive, a=np.zeros(3))
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    formats = {
        "empty.pt": (b"", "is empty"),
        "one_byte.pt": (b"P", _NO_MODEL),
        "magic.pt": (b"PK\x03\x04", _DAMAGED),
        "text.pt": (b"weights, I promise\n" * 9, _NO_MODEL),
        "page.pt": (b"<!DOCTYPE html><html>Not found</html>", _NO_MODEL),
        "model.json": (b'{"layers": []}', _NO_MODEL),
        "model.py": (b"import os\nos.system('touch canary')\n", _NO_MODEL),
        "library.so": (b"\x7fELF" + bytes(100), _NO_MODEL),
        "model.gz": (b"\x1f\x8b\x08" + bytes(40), _NO_MODEL),
        "picture.png": (b"\x89PNG\r\n\x1a\n" + bytes(40), _NO_MODEL),
        "zeros.bin": (bytes(5000), _NO_MODEL),
        "array.npy": (array.getvalue(), _NO_MODEL),
        "arrays.npz": (archive.getvalue(), _OTHER),
        "model.safetensors": (save_safetensors({"a": torch.zeros(2)}), "looks like safetensors"),
        "legacy.pth": (saved(network(), _use_new_zipfile_serialization=False), "format of torch before 1.6"),
        "old.tar": (b"pickle\0" + bytes(505), _NO_MODEL),
    }
    for name, (content, expected) in formats.items():
        yield Case(name, content, expected)
    for protocol in range(6):
        expected = "plain pickle" if protocol > 1 else _NO_MODEL
        yield Case(f"plain_{protocol}.pkl", pickle.dumps({"a": 1}, protocol), expected)


def _no_files() -> Iterator[Case]:
    yield Case("folder.pt", lambda path: path.mkdir(), "Is a directory")
    yield Case("fifo.pt", os.mkfifo, "not a regular file")
    yield Case("socket.pt", _make_socket, "not a regular file")
    yield Case("null.pt", lambda path: path.symlink_to("/dev/null"), "not a regular file")
    yield Case("endless.pt", lambda path: path.symlink_to("/dev/zero"), "not a regular file")
    yield Case("loop.pt", lambda path: path.symlink_to(path), "symbolic links")
    yield Case("dangling.pt", lambda path: path.symlink_to("nothing"), "No such file")
    yield Case("missing.pt", lambda path: None, "No such file")
    yield Case("n" * 300 + ".pt", lambda path: None, "File name too long")
    yield Case("good.pt/below.pt", lambda path: None, "Not a directory|No such file")


def _make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:  # whose path may not be long
        server.bind(path.name)


def _cut_short() -> Iterator[Case]:
    good, exported = saved(network()), program()
    for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        yield Case(f"cut_{share}.pt", good[: int(len(good) * share)], _DAMAGED)
        yield Case(f"cut_{share}.pt2", exported[: int(len(exported) * share)], _DAMAGED)
    yield Case("cut_1.pt", good[:-1], _DAMAGED)
    yield Case("behind.pt", good + b"more", _DAMAGED)
    yield Case("before.pt", b"PK" + good, _DAMAGED)
    yield Case("twice.pt", good + good, _DAMAGED)


def _odd_archives() -> Iterator[Case]:
    good = entries(saved(network()))
    yield Case("compressed.pt", packed(good, zipfile.ZIP_DEFLATED), "compressed")
    yield Case(
        "bomb.pt", packed(good | {"archive/data/9": bytes(50_000_000)}, zipfile.ZIP_DEFLATED), "compressed"
    )
    yield Case("lzma.pt", packed(good, zipfile.ZIP_LZMA), "compressed")
    for name in (
        "../canary",
        "/canary",
        "archive/../../canary",
        "archive\\canary",
        "archive/",
        "canary",
        "other/canary",
    ):
        title = name.replace("/", "_").replace("\\", "_").replace(".", "_")
        yield Case(f"entry{title}.pt", packed(good | {name: b""}), _OTHER)
    yield Case("unknown_entry.pt", packed(good | {"archive/code.py": b"print()"}), "does not write")
    yield Case("no_pickle.pt", packed({n: c for n, c in good.items() if not n.endswith("data.pkl")}), _OTHER)
    yield Case("no_entries.pt", packed({}), _DAMAGED)
    plain = packed(good)
    double = packed(good | {"archive/data.pkk": good["archive/data.pkl"]}).replace(b"data.pkk", b"data.pkl")
    yield Case("two_pickles.pt", double, "twice")
    yield Case(
        "checksum.pt", plain.replace(b"cconv", b"c0onv").replace(b"training", b"tralning", 1), _DAMAGED
    )
    comment = plain[:-2] + struct.pack("<H", 4) + b"note"
    yield Case("comment.pt", comment, _DAMAGED)
    central = plain.index(b"PK\x01\x02")
    yield Case("encrypted.pt", _patched(plain, central + 8, b"\x01\x00"), "encrypted")
    yield Case(
        "other_local_name.pt", plain.replace(b"archive/data.pkl", b"archive/data.pkk", 1), "two things"
    )
    yield Case("lying_size.pt", _patched(plain, central + 24, struct.pack("<L", 2**31)), "compressed|damaged")
    yield Case("lying_sizes.pt", _patched(plain, central + 20, struct.pack("<2L", 2**31, 2**31)), _DAMAGED)
    yield Case("lying_offset.pt", _patched(plain, central + 42, struct.pack("<L", 2**31)), _DAMAGED)
    yield Case("many_entries.pt", _patched(plain, len(plain) - 12, b"\xff\xff"), _DAMAGED)
    yield Case(
        "byteorder.pt",
        packed(good | {"archive/byteorder": b"middle"}),
        "byteorder|byte order|byte_order|endian",
    )


def _patched(content: bytes, position: int, change: bytes) -> bytes:
    return content[:position] + change + content[position + len(change) :]
