"""A process that is killed while it replaces an ONNX file and its weights."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = """
import os, signal, sys
from pathlib import Path
from pn_compiler.export import files
folder, last, moves, rename = Path(sys.argv[1]), int(sys.argv[2]), [], Path.rename
def counted(self, to):
    if len(moves) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    moves.append(to)
    return rename(self, to)
Path.rename = counted
with files.staging_folder(folder / "m.onnx") as staged:
    for name in ("m.onnx", "m.onnx.data"):
        (staged / name).write_text("new")
    files.publish([staged / "m.onnx.data", staged / "m.onnx"], folder)
"""


def replace_pair_until_killed(folder: Path, moves: int) -> None:
    """Replaces m.onnx and m.onnx.data, "old", by "new" ones, killed after `moves` of the four moves."""
    for name in ("m.onnx", "m.onnx.data"):
        (folder / name).write_text("old")
    command = [sys.executable, "-c", CODE, str(folder), str(moves)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False, timeout=120)
    assert done.returncode == (-signal.SIGKILL if moves < 4 else 0)
