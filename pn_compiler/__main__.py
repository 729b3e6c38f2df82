"""Where ``pn-compile`` and ``python -m pn_compiler`` start: from here on Ctrl-C is one line.

Nothing but the standard library's smallest parts is imported before the handler stands.
"""

import os
import signal
import sys

_STATUS = 130  # as pn_compiler.base.interruption has it, which is not imported yet


def main() -> int:
    """Runs the command and returns its exit status; signals do nothing more once that is known."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    from pn_compiler import cli

    try:
        return cli.main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # while Python ends there is nothing left to stop
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(number: int, frame: object) -> None:
    """Ends the process: nothing has been written, and an import that goes on may swallow an exception."""
    try:
        os.write(2, b"pn-compile: error: interrupted; nothing was written\n")
    finally:
        os._exit(_STATUS)


if __name__ == "__main__":
    sys.exit(main())
