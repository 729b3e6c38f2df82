"""What Windows lacks is not needed: the command runs where it is hidden."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.security.files import large_network, saved
from tests.security.sandbox import ROOT

HIDE = """
import os, signal, sys
import torch, onnx, onnxruntime, onnxscript  # which need some of it on Linux
for name in ("fcntl", "resource", "pwd", "grp", "termios", "syslog"):
    sys.modules[name] = None
for module, names in {
    os: ("O_NOFOLLOW", "O_NONBLOCK", "fork", "getuid", "killpg", "mkfifo", "sched_getaffinity", "sysconf"),
    signal: ("SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGXFSZ", "setitimer"),
}.items():
    for name in names:
        delattr(module, name)
from pn_compiler.__main__ import main
sys.exit(main() or main())  # the second time the files are replaced
"""


def test_without_what_only_unix_has(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(saved(large_network()))
    (tmp_path / ".pn-compile-abc.tmp").mkdir()
    np.savez(tmp_path / "data.npz", np.random.default_rng(0).normal(size=(4, 3, 8, 8)))
    command = [
        sys.executable, "-c", HIDE, "model.pt", "-o", "m.onnx", "--external-data", "--report", "r.json",
        "--calibrate", "data.npz", "--model-repository", "models", "--name", "net",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = {path.name for path in tmp_path.iterdir()}
    # without locks nobody knows whether a temporary folder is in use: it stays
    assert found == {
        ".pn-compile-abc.tmp", "data.npz", "m.onnx", "m.onnx.data", "model.pt", "models", "r.json",
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "models" / "net").glob("[0-9]")) == ["1", "2"]
