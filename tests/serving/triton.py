"""Triton's own server, from nvidia-pytriton in ``.venv-triton``, with a stand-in for its ONNX backend.

``python tests/serving/triton.py model_repository`` serves until Ctrl-C. ``make triton`` installs it.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
VENV = ROOT / ".venv-triton"
STAND_IN = Path(__file__).parent / "backends" / "onnxruntime"


def command(repository: Path, http: int, grpc: int, *more: str) -> list[str]:
    return [
        str(_triton() / "bin" / "tritonserver"),
        f"--model-repository={repository}", f"--backend-directory={_backends()}",
        "--http-address=127.0.0.1", f"--http-port={http}",
        "--grpc-address=127.0.0.1", f"--grpc-port={grpc}",
        "--allow-metrics=false", "--exit-timeout-secs=5", *more,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """The backend finds its Python by PATH, and its libraries in the package."""
    return {
        **os.environ,
        "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(VENV),
        "LD_LIBRARY_PATH": str(_triton().parent.parent / "nvidia_pytriton.libs"),
    }


def _backends() -> Path:
    """A folder with Triton's Python backend, and the backend "onnxruntime" that it runs; made once."""
    folder = VENV / "backends"
    version = _triton().parent.parent.parent.name.removeprefix("python")
    stub = _triton() / "python_backend_stubs" / version / "triton_python_backend_stub"
    libraries = subprocess.run(["ldd", stub], capture_output=True, text=True, check=True).stdout
    if f"libpython{version}.so.1.0 => not found" in libraries:
        sys.exit(f"Triton's Python backend needs libpython{version}: apt-get install libpython{version}")
    if not folder.exists():
        new = VENV / f"backends.{os.getpid()}"
        shutil.copytree(_triton() / "backends" / "python", new / "python")
        shutil.copy(stub, new / "python")
        (new / "onnxruntime").symlink_to(STAND_IN)
        new.rename(folder)
    return folder


def _triton() -> Path:
    if not (VENV / ".installed").exists():
        sys.exit(f"there is no {VENV}: make triton")
    (found,) = (VENV / "lib").glob("python3.*/site-packages/pytriton/tritonserver")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--http", type=int, default=8000, metavar="PORT")
    parser.add_argument("--grpc", type=int, default=8001, metavar="PORT")
    arguments = parser.parse_args()
    line = command(arguments.repository, arguments.http, arguments.grpc)
    os.execve(line[0], line, environment())  # the server takes this process, and its signals


if __name__ == "__main__":
    main()
