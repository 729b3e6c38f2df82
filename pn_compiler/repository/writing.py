"""Writing a model repository: a folder that Triton and MLServer serve as it is."""

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from pn_compiler.base.errors import ExportError
from pn_compiler.base.files import (
    REPLACED,
    check_unicode,
    check_writable,
    temporary_folder,
    write_atomically,
)
from pn_compiler.export.onnx_file import OnnxFile
from pn_compiler.export.runtimes import oldest_onnxruntime
from pn_compiler.export.sessions import load_session
from pn_compiler.repository.golden import Arrays, Golden
from pn_compiler.repository.golden_calls import Calls, check_golden, why_no_batching
from pn_compiler.repository.manifests import model_files, server_files, to_json
from pn_compiler.repository.options import ModelRepository
from pn_compiler.repository.triton_config import config_text, parse_config, triton_config


@dataclasses.dataclass(frozen=True, slots=True)
class WrittenVersion:
    """A version of a model in its repository.

    Attributes:
        folder: of the version.
        file: the ONNX file in it.
        batching: what a server may do with several requests, in words.
    """

    folder: Path
    file: Path
    batching: str


def check_repository(repository: ModelRepository) -> None:
    """Raises ExportError if no version can be written: before the work, not after it."""
    directory = repository.directory
    check_unicode(directory)
    try:
        exists = directory.exists()
    except OSError as error:  # a name that is too long
        raise ExportError(f"cannot write {directory}: {error.strerror}") from error
    if exists and not directory.is_dir():
        raise ExportError(f"cannot write {directory}: it is no folder")
    check_writable(directory / "settings.json" if exists else directory)


def write_repository(
    repository: ModelRepository,
    model: OnnxFile,
    calls: Calls,
    *,
    tolerance: float,
    made: dict[str, Any],
) -> WrittenVersion:
    """Writes a new version of a model into a repository, whole or not at all.

    Args:
        repository: where, under which name, and how many samples a server may put into a batch.
        model: the ONNX file; external data beside it come along.
        calls: golden inputs and outputs, the largest batch last.
        tolerance: largest relative error that is accepted, here and by the smoke test.
        made: how the file was made, for ``report.json``.

    Raises:
        ExportError: the folder cannot be written, or holds another interface under this name.
        VerificationError: the file, loaded from its place, does not give the golden outputs.
    """
    number = _next_version(repository)
    with _staging(repository) as stage:
        folder = stage / repository.name
        version = folder / str(number)
        version.mkdir(parents=True)
        file = model.copy_to(version / "model.onnx")
        session = load_session(str(file))
        check_golden(session, calls, tolerance)
        reason = why_no_batching(model, session, calls[-1][0], tolerance)
        limit = 0 if reason else repository.max_batch_size
        batching = f"no batching by the server: {reason}" if reason else f"batches of {limit} at most"
        config = triton_config(model.inputs, model.outputs, limit)
        _check_interface(repository, config)
        golden = Golden(repository.name, number, tolerance, tuple(c for c in calls if _fits(c, limit)))
        report = _report(golden, model, limit, batching, made)
        (version / "golden.npz").write_bytes(golden.to_bytes())
        (version / "report.json").write_bytes(to_json(report))
        place = file.relative_to(folder)
        shared = model_files(repository.name, number, place.as_posix(), limit)
        shared["config.pbtxt"] = config_text(config).encode()
        _publish(repository, version, shared, spare=stage / REPLACED / version.relative_to(stage))
    target = repository.directory / repository.name
    return WrittenVersion(target / str(number), target / place, batching)


def _fits(call: tuple[Arrays, Arrays], max_batch_size: int) -> bool:
    """Whether a server takes the batch of a call; 0 is any."""
    return not max_batch_size or len(next(iter(call[0].values()))) <= max_batch_size


def _next_version(repository: ModelRepository) -> int:
    """The number of the version to write: a new one, or the newest if it is to be replaced."""
    folder = repository.directory / repository.name
    newest = max((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), default=0)
    return newest if repository.force and newest else newest + 1


def _check_interface(repository: ModelRepository, config: Message) -> None:
    """Versions of a model share a config.pbtxt: raises ExportError if the old one differs."""
    path = repository.directory / repository.name / "config.pbtxt"
    if repository.force or not path.exists():
        return
    old = parse_config(path.read_text())
    for field in ("input", "output"):
        if [*getattr(old, field)] != [*getattr(config, field)]:
            raise ExportError(
                f"{path} describes other {field}s than this model has: choose another name, or replace "
                "the newest version by force"
            )


def _report(
    golden: Golden, model: OnnxFile, max_batch_size: int, batching: str, made: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": golden.model,
        "version": golden.version,
        "opset": model.opset_version,
        "ir_version": model.ir_version,
        "oldest_onnxruntime": oldest_onnxruntime(model.opset_version, model.ir_version),
        "inputs": model.inputs,
        "outputs": model.outputs,
        "max_batch_size": max_batch_size,
        "batching": batching,
        "golden_batches": [len(next(iter(inputs.values()))) for inputs, _ in golden.calls],
        "tolerance": golden.tolerance,
        "files": model.digests(),
        "made": made | {"by": f"pn_compiler {importlib.metadata.version('pn-compiler')}"},
    }


@contextlib.contextmanager
def _staging(repository: ModelRepository) -> Iterator[Path]:
    """A folder in the repository, on its disk, in which a version is made; it is gone at the end."""
    directory = repository.directory
    existed = directory.exists()
    try:
        directory.mkdir(exist_ok=True)
        with temporary_folder(directory) as stage:
            yield stage
    except OSError as error:
        raise ExportError(f"cannot write {directory}: {error.strerror}") from error
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # there is something in it
                directory.rmdir()


def _publish(repository: ModelRepository, version: Path, shared: dict[str, bytes], *, spare: Path) -> None:
    """Renames a finished version into its place, and lets the files that all versions share point to it.

    Args:
        version: in the staging folder.
        shared: name -> content of the files beside the versions. A config.pbtxt that is there is kept, as are
            the files beside the models, for someone may have tuned them.
        spare: where a version that is replaced goes.
    """
    for name, content in server_files(repository.directory.resolve().name).items():
        if repository.force or not (repository.directory / name).exists():
            write_atomically(repository.directory / name, content)
    target = repository.directory / repository.name
    if not target.exists():
        for name, content in shared.items():
            (version.parent / name).write_bytes(content)
        os.rename(version.parent, target)
        return
    place = target / version.name
    spare.parent.mkdir(parents=True)
    try:
        if repository.force and place.exists():
            os.rename(place, spare)
        os.rename(version, place)  # fails if someone else wrote this version meanwhile
    except BaseException:  # Ctrl-C, too
        if spare.exists():
            os.rename(spare, place)
        raise
    for name, content in shared.items():
        if name != "config.pbtxt" or repository.force or not (target / name).exists():
            write_atomically(target / name, content)
