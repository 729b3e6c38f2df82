"""The smoke test where there is no server to ask; tests/serving has the others."""

import http.server
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pn_compiler import smoke
from pn_compiler.repository.golden import Golden
from tests.serving.processes import free_ports


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    calls = (({"x": np.ones((2, 3), np.float32)}, {"y": np.ones((2, 1), np.float32)}),)
    path = tmp_path / "golden.npz"
    path.write_bytes(Golden("net", 1, 1e-4, calls).to_bytes())
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert smoke.main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("smoke: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_nobody_listens(golden: Path, capsys: pytest.CaptureFixture[str], protocol: str) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    arguments = (address, "--golden", golden, "--protocol", protocol)
    assert f"{address} cannot be reached (is it live?): " in told(capsys, *arguments)
    assert "Connection refused" in told(capsys, *arguments, "--wait", "0.5")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("url", ["", "localhost:abc", "127.0.0.1:99999", "http://"])
def test_no_address(golden: Path, capsys: pytest.CaptureFixture[str], url: str, protocol: str) -> None:
    message = told(capsys, url, "--golden", golden, "--protocol", protocol)
    assert f"url {url!r}: expected an address such as 127.0.0.1:8000" in message


def test_a_server_of_something_else(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        message = told(capsys, f"http://{address}/", "--golden", golden)
        server.shutdown()
    assert "the server is not live, or speaks another protocol" in message


def test_golden_files_come_back(golden: Path) -> None:
    found = Golden.load(golden)
    assert (found.model, found.version, found.tolerance) == ("net", 1, 1e-4)
    assert [{**x, **y}.keys() for x, y in found.calls] == [{"x", "y"}]


def test_a_wrong_golden_file(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "127.0.0.1:1"
    assert "cannot read absent.npz: No such file" in told(capsys, url, "--golden", "absent.npz")
    whole = golden.read_bytes()
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    np.savez(tmp_path / "objects.npz", calls=np.array([{}], object))
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("outputs, I promise")
    (tmp_path / "empty.npz").touch()
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as file:
        file.writestr("calls", "1")
    for path in sorted({*tmp_path.glob("*.npz")} - {golden}):
        assert f"{path} is not a golden.npz that pn_compiler wrote" in told(capsys, url, "--golden", path)


def test_wrong_usage_is_status_2() -> None:
    with pytest.raises(SystemExit) as caught:
        smoke.main(["127.0.0.1:8000"])
    assert caught.value.code == 2


def test_without_tritonclient(golden: Path) -> None:
    code = (
        "import sys; sys.modules['tritonclient'] = None; from pn_compiler import smoke; "
        f"sys.exit(smoke.main(['127.0.0.1:1', '--golden', {str(golden)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr == "smoke: error: the smoke test needs tritonclient: pip install 'pn-compiler[serving]'\n"
    )
