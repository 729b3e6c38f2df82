"""The files that a run of the command writes, checked before the work."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from pn_compiler.base.errors import ConfigError

STDOUT = Path("-")


def reports(arguments: argparse.Namespace) -> list[Path]:
    """The files that the report goes to."""
    return [path for path in arguments.report if path != STDOUT]


def check_files(arguments: argparse.Namespace, node_data: Sequence[str]) -> None:
    """Raises PnCompilerError if a file cannot be written, or is another one that is named, too.

    Args:
        node_data: names of the files in the folder of ``--node-data``.
    """
    from pn_compiler.base.files import check_writable

    folder = _in_folder(arguments.node_data, node_data)
    written = [*reports(arguments), arguments.plot, arguments.save_config, *folder]
    output = None if arguments.dry_run else arguments.output
    for path in (output, *written):
        if path is not None:
            check_writable(path)
    data = [Path(source) for source in (arguments.diagnose, arguments.calibrate) if source is not None]
    weights = [Path(f"{arguments.output}.data")] if arguments.output and "external_data" in arguments else []
    read = [arguments.model, arguments.config, *data]
    _refuse_same_file([*read, arguments.output, *written, *weights])


def _in_folder(folder: Path | None, names: Sequence[str]) -> list[Path]:
    """The files `names` in `folder`; it alone if it is still to be made."""
    if folder is None:
        return []
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"cannot write {folder}: expected a folder, or the name of a new one")
    return [folder / name for name in names] if folder.is_dir() else [folder]


def _refuse_same_file(paths: Sequence[Path | None]) -> None:
    """Files that are read and files that are written must be different ones."""
    seen: set[object] = set()
    for path in paths:
        if path is not None:
            identity = _identity(path)
            if identity in seen:
                raise ConfigError(
                    f"{path} is named twice among the model, the data, the output, the report and the recipes"
                )
            seen.add(identity)


def _identity(path: Path) -> object:
    """Equal for two names of one file, links of both kinds included."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # there is none yet, or it cannot be looked at
        return os.path.realpath(path)
    return found.st_dev, found.st_ino
