"""Whether a path is a file that can be read: a pipe would block, a device never end."""

import os
import stat
from pathlib import Path


def why_unreadable(path: str | Path) -> str | None:
    """Why there is no regular file at `path`, behind links; None if there is one."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # a NUL in the name
        return str(error)
    if stat.S_ISDIR(mode):
        return "Is a directory"
    return None if stat.S_ISREG(mode) else "it is a device, pipe or socket, not a regular file"
