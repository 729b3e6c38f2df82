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


def check_files(arguments: argparse.Namespace) -> None:
    """Raises PnCompilerError if a file cannot be written, or is another one that is named, too."""
    from pn_compiler.base.files import check_writable

    written = [*reports(arguments), arguments.plot]
    output = None if arguments.dry_run else arguments.output
    for path in (output, *written):
        if path is not None:
            check_writable(path)
    data = [Path(source) for source in (arguments.diagnose, arguments.calibrate) if source is not None]
    weights = [Path(f"{arguments.output}.data")] if arguments.output and "external_data" in arguments else []
    _refuse_same_file([arguments.model, arguments.output, *written, *data, *weights])


def _refuse_same_file(paths: Sequence[Path | None]) -> None:
    """The model, the data, the ONNX file with its weights and the reports must be different files."""
    seen: set[object] = set()
    for path in paths:
        if path is not None:
            identity = _identity(path)
            if identity in seen:
                raise ConfigError(
                    f"{path} is named twice among the model, the data, the output and the report"
                )
            seen.add(identity)


def _identity(path: Path) -> object:
    """Equal for two names of one file, links of both kinds included."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # there is none yet, or it cannot be looked at
        return os.path.realpath(path)
    return found.st_dev, found.st_ino
