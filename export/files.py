"""Writing a file so that it is there whole or not at all."""

import os
import tempfile
from pathlib import Path

from pn_compiler.errors import ExportError


def check_writable(path: Path) -> None:
    """Raises ExportError if a file cannot be made at `path`: before the work, not after it."""
    folder = path.parent
    if not folder.is_dir():
        raise ExportError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir():
        raise ExportError(f"cannot write {path}: it is a folder")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not tell of read-only disks
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror} in {folder}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` beside `path` and renames it at the end; on failure nothing is left.

    Raises:
        ExportError: the file cannot be written, for example because the disk is full.
    """
    check_writable(path)
    name = ""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if name and os.path.exists(name):
            os.unlink(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
