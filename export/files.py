"""Writing a file so that it is there whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` for what is not whole yet; it and what is left in it goes at the end.

    Raises:
        ExportError: it cannot be made, or what is done in it fails, for example because the disk is full.
    """
    check_writable(path)
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        yield folder
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Sequence[Path], folder: Path) -> None:
    """Moves files that belong together to `folder`, the one that names the others last.

    Whenever this is cut off, that one is not there, or all are: the new ones, or the old ones.

    Raises:
        OSError: a file cannot be moved; the old ones are back then.
    """
    for path in staged:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.chmod(0o666 & ~_umask())
    old = staged[0].parent / "old"
    old.mkdir()
    done: list[tuple[Path, Path]] = []
    try:
        for path in reversed(staged):
            if (target := folder / path.name).exists():
                target.rename(old / path.name)
                done.append((target, old / path.name))
        for path in staged:
            path.rename(folder / path.name)
            done.append((path, folder / path.name))
    except BaseException:
        for source, moved in reversed(done):
            moved.rename(source)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
