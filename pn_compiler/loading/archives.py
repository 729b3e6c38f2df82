"""The zip archives of torch.save and torch.export, opened only if they are built as torch builds them.

Python's zipfile and the reader inside torch could see different archives in one hostile file, so whatever
leaves room for two readings (data before or behind, a comment, two entries of a name) is refused. As entries
are stored, not compressed, an archive never holds more than the file is long.
"""

import dataclasses
import io
import os
import re
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from pn_compiler.base.errors import LoadError
from pn_compiler.base.regular_files import why_unreadable

_PART = re.compile(r"[^/\\\x00-\x1f]{1,255}")  # of the name of an entry
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_END = struct.Struct("<4s4H2LH")  # end of central directory
_LOCAL = struct.Struct("<4s5H3L2H")  # header before the bytes of an entry
_SEE_ZIP64 = 0xFFFF  # for the number of entries
_TEXT = 2**28  # bytes of an entry that is parsed, such as the graph of a program


@dataclasses.dataclass(frozen=True, slots=True)
class Archive:
    """A zip archive whose entries all lie in one folder.

    Attributes:
        path: the file, for messages and for torch.
        folder: the folder that holds all entries.
        sizes: name of an entry, below that folder -> bytes.
        content: bytes of an archive that is an entry of the one at `path`; else it is read from there.
    """

    path: Path
    folder: str
    sizes: dict[str, int]
    content: bytes | None = None

    @classmethod
    def open(cls, path: Path) -> "Archive":
        """Opens `path`. Raises LoadError if it is not a regular file or not an archive written by torch."""
        start = read_start(path)
        if not start:
            raise LoadError(f"{path} is empty")
        if not start.startswith(b"PK"):
            raise LoadError(f"{path} {_other_format(start)}")
        try:
            with path.open("rb") as file:
                folder, sizes = _directory(path, file)
        except OSError as error:
            raise _cannot_read(path, error) from error
        return cls(path, folder, sizes)

    def inner(self, name: str) -> "Archive":
        """An entry as an archive. Raises LoadError if it is not one as torch writes it."""
        content = self.read(name)
        return Archive(self.path, *_directory(self.path, io.BytesIO(content)), content)

    def read(self, name: str) -> bytes:
        """The bytes of an entry. Raises LoadError if it is missing, damaged or too long."""
        if name not in self.sizes:
            raise LoadError(f"{self.path} is damaged: it has no {name}")
        if self.sizes[name] > _TEXT:
            raise LoadError(f"{self.path} holds {name} of {self.sizes[name]} bytes: at most {_TEXT} are read")
        try:
            with zipfile.ZipFile(self.path if self.content is None else io.BytesIO(self.content)) as archive:
                return archive.read(f"{self.folder}/{name}")
        except Exception as error:  # such as a wrong checksum
            raise LoadError(f"{self.path} is damaged: {name} cannot be read") from error


def read_start(path: Path, size: int = 16) -> bytes:
    """The first bytes of a regular file; reading anything else might block or never end.

    Raises:
        LoadError: there is no such file, it cannot be read, or it is a folder, device, pipe or socket.
    """
    if reason := why_unreadable(path):
        raise LoadError(f"cannot read {path}: {reason}")
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise _cannot_read(path, error) from error


def _cannot_read(path: Path, error: OSError) -> LoadError:
    return LoadError(f"cannot read {path}: {error.strerror or error}")


def _other_format(start: bytes) -> str:
    """Says what a file is that does not start like a zip archive, and what to do."""
    if start[:1] == b"\x80":
        return (
            "is in the format of torch before 1.6 or a plain pickle, which cannot be checked: "
            "load it where you trust it and save it again with torch.save"
        )
    return "is not a model saved by torch.save or torch.export"


def _directory(path: Path, file: BinaryIO) -> tuple[str, dict[str, int]]:
    """The folder that holds all entries, and name -> bytes.

    Raises:
        LoadError: the archive is broken, or not as torch writes it.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _refuse_torchscript(path, entries)
            _check_directory(path, file, archive)
    except (LoadError, OSError):
        raise
    except Exception as error:  # a damaged directory can raise anything in zipfile
        raise LoadError(f"{path} is damaged: its zip archive is cut short or broken") from error
    folders = {entry.filename.partition("/")[0] for entry in entries}
    if len(folders) != 1:
        raise LoadError(f"{path} is a zip archive but not a model saved by torch.save or torch.export")
    return folders.pop(), {entry.filename.partition("/")[2]: entry.file_size for entry in entries}


def _refuse_torchscript(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise LoadError(
            f"{path} is TorchScript, which has no modules to convert: save the original nn.Module "
            "with torch.save, or a torch.export program of it"
        )


def _check_directory(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Raises LoadError unless the archive is unambiguous and holds what its directory says."""
    entries = archive.infolist()
    file.seek(-_END.size, os.SEEK_END)
    signature, disk, first_disk, here, count, *_ = _END.unpack(file.read())
    if archive.comment or signature != b"PK\5\6":
        raise LoadError(f"{path} is damaged: there is data behind its zip archive")
    if disk or first_disk or here != count or count not in (len(entries), _SEE_ZIP64):
        raise LoadError(f"{path} is damaged: its zip archive is cut short or broken")
    double = [name for name, count in Counter(entry.filename for entry in entries).items() if count > 1]
    if double:
        raise LoadError(f"{path} is damaged: it holds {double[0][:80]!r} twice")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        _check_entry(path, entry)
        name = entry.orig_filename.encode()
        file.seek(entry.header_offset)
        local = file.read(_LOCAL.size)
        signature, *_, length, extra = _LOCAL.unpack(local)
        start = entry.header_offset
        if signature != b"PK\3\4" or file.read(length) != name or start < end or (start and not end):
            raise LoadError(
                f"{path} is damaged: its zip archive says two things about {name.decode()[:80]!r}"
            )
        end = start + _LOCAL.size + length + extra + entry.file_size
    if not entries or end > archive.start_dir:
        raise LoadError(f"{path} is damaged: its zip archive is empty or cut short")


def _check_entry(path: Path, entry: zipfile.ZipInfo) -> None:
    if entry.flag_bits & _ENCRYPTED:
        raise LoadError(f"{path} is encrypted, which torch cannot read: decrypt it first")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise LoadError(f"{path} holds compressed entries, which torch does not write: save it again")
    parts = entry.filename.split("/")
    if len(parts) < 2 or ".." in parts or not all(_PART.fullmatch(part) for part in parts):
        raise LoadError(
            f"{path} is a zip archive but not a model saved by torch.save or torch.export: it holds "
            f"{entry.filename[:80]!r}"
        )
