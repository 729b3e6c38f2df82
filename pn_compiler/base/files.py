"""Writing a file so that it is there whole or not at all."""

import contextlib
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pn_compiler.base.errors import ExportError

try:
    import fcntl

    _LOCKS = True
except ImportError:  # Windows: what killed processes leave is not told from what is in use, and stays
    _LOCKS = False

logger = logging.getLogger(__name__)

_PREFIX, _SUFFIX = ".pn-compile-", ".tmp"
_TEMPORARY = re.compile(rf"{re.escape(_PREFIX)}\w+{re.escape(_SUFFIX)}")
REPLACED = "old"  # in a temporary folder: what new files and folders take the place of


def output_target(path: Path) -> Path:
    """Where a file at `path` is to be written: `path` itself, or what it links to.

    Raises:
        ExportError: there is something else than a regular file, or links lead nowhere.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ExportError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    if mode is not None and stat.S_ISDIR(mode):
        raise ExportError(f"cannot write {path}: it is a folder")
    if mode is not None and not stat.S_ISREG(mode):
        raise ExportError(f"cannot write {path}: it is a device, pipe or socket, not a regular file")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_writable(path: Path) -> None:
    """Raises ExportError if a file cannot be made at `path`: before the work, not after it."""
    folder = output_target(path).parent
    if not folder.is_dir():
        raise ExportError(f"cannot write {path}: there is no folder {folder}")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not tell of read-only disks
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror} in {folder}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` beside `path` and renames it at the end; on failure nothing is left.

    Where `path` is a link, the file that it leads to is written.

    Raises:
        ExportError: the file cannot be written, for example because the disk is full.
    """
    with staged_file(path) as staged:
        staged.write_bytes(content)


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Where to write what is renamed to `path` at the end; as `write_atomically`."""
    with staging_folder(path) as stage:
        staged = stage / "content"
        yield staged
        with staged.open("r+b") as file:  # Windows flushes none that is only read
            os.fsync(file.fileno())
        staged.chmod(0o666 & ~_umask())
        staged.replace(output_target(path))


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` for what is not whole yet; it and what is left in it goes at the end.

    Raises:
        ExportError: it cannot be made, or what is done in it fails, for example because the disk is full.
    """
    check_writable(path)
    try:
        with temporary_folder(output_target(path).parent) as folder:
            yield folder
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder in `parent` that is gone at the end; those that killed processes left there go first.

    It is locked while it is used: the system lets go of the lock when the process ends, however that is.
    Where there are no locks, as on Windows, what killed processes left stays.

    Raises:
        OSError: it cannot be made.
    """
    _remove_abandoned(parent)
    folder, lock = _make_locked(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make_locked(parent: Path) -> tuple[Path, int | None]:
    """A new folder, and the open file that locks it; None where there are no locks."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=parent))
        if not _LOCKS:
            return folder, None
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for abandoned: once more
            continue
        with contextlib.suppress(BlockingIOError):  # likewise
            _lock(lock)
            if folder.exists():
                return folder, lock
        os.close(lock)


def _lock(file: int) -> None:
    """Raises BlockingIOError if another process has locked it; some file systems know no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        logger.debug("no locks here: temporary folders of killed processes stay")


def _remove_abandoned(parent: Path) -> None:
    """Removes temporary folders in `parent` that no process holds, after giving back what they replaced."""
    if not _LOCKS:
        return
    try:
        found = [path for path in parent.iterdir() if _TEMPORARY.fullmatch(path.name)]
    except OSError:  # a folder may be written to and not read
        return
    for folder in found:
        if folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):  # in use, or somebody else's
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _give_back(folder, parent)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _give_back(folder: Path, parent: Path) -> None:
    """Undoes a `publish` that was cut off: the old files return if the last of the new ones is not there.

    So do old versions in a model repository, which lie one folder deeper.
    """
    replaced = folder / REPLACED
    for version in replaced.glob("*/*"):
        if not (parent / version.relative_to(replaced)).exists():
            version.rename(parent / version.relative_to(replaced))
    files = [path for path in replaced.glob("*") if path.is_file()]
    old = sorted(files, key=lambda path: -len(path.name))
    if not all((parent / path.name).exists() for path in old):
        for path in old:  # FILE.data before FILE
            path.replace(parent / path.name)


def check_unicode(path: Path) -> None:
    """Raises ExportError if libraries that ask for Unicode cannot open a file at `path`."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ExportError(f"cannot write {path}: onnx takes no name that is not Unicode") from error


def check_plain(path: Path) -> None:
    """Raises ExportError if a file that goes to `path` beside another would take the place of a link."""
    output_target(path)
    if path.is_symlink():
        raise ExportError(f"cannot write {path}: it is a link, which a file of weights would replace")


def publish(staged: Sequence[Path], folder: Path) -> None:
    """Moves files that belong together to `folder`, the one that names the others last.

    Whenever this is cut off, that one is not there, or all are: the new ones, or the old ones.

    Raises:
        ExportError: there is a link or something else than a file where one goes.
        OSError: a file cannot be moved; the old ones are back then.
    """
    for path in staged:
        check_plain(folder / path.name)
    for path in staged:
        with path.open("r+b") as file:  # Windows flushes none that is only read
            os.fsync(file.fileno())
        path.chmod(0o666 & ~_umask())
    old = staged[0].parent / REPLACED
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
