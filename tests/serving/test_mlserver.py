"""MLServer serves the same repository, with the runtime file that lies in it."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http

from pn_compiler.repository.golden import Golden
from tests.serving.processes import ROOT, free_ports, running, smoke, wait_for

pytestmark = pytest.mark.servers

MLSERVER = ROOT / ".venv-mlserver" / "bin" / "mlserver"


@pytest.fixture(scope="module")
def addresses(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a running server, by protocol."""
    http, grpc, metrics = free_ports(3)
    env = {
        **os.environ,
        "MLSERVER_HOST": "127.0.0.1",
        "MLSERVER_HTTP_PORT": str(http),
        "MLSERVER_GRPC_PORT": str(grpc),
        "MLSERVER_METRICS_PORT": str(metrics),
    }
    log = tmp_path_factory.mktemp("mlserver") / "log.txt"
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{http}")

    def ready() -> bool:
        assert process.poll() is None, "the server ended"
        try:
            return bool(client.is_server_ready())
        except OSError:
            return False

    with running([str(MLSERVER), "start", "."], log, env=env, cwd=repository) as process:
        wait_for(ready, "the server is ready", 60)
        yield {"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"}
        client.close()


@pytest.mark.parametrize("model", ["digits", "pair"])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_smoke_of_an_unedited_repository(
    addresses: dict[str, str], repository: Path, model: str, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = repository / model / "1" / "golden.npz"
    assert smoke(addresses[protocol], "--golden", golden, "--protocol", protocol, "--wait", 20) == 0
    assert f"smoke: passed: {model} on {addresses[protocol]} ({protocol})" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_wrong_model_and_wrong_values(
    addresses: dict[str, str],
    repository: Path,
    tmp_path: Path,
    protocol: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    golden = repository / "digits" / "1" / "golden.npz"
    arguments = (addresses[protocol], "--protocol", protocol)
    assert smoke(*arguments, "--golden", golden, "--model", "absent") == 1
    messages = {
        "http": "model absent is not ready, or there is none",
        "grpc": "Model absent with version not found",
    }
    assert messages[protocol] in capsys.readouterr().err
    calls = Golden.load(golden).calls
    wrong = Golden("digits", 1, 1e-4, tuple((x, {"output": np.flip(y["output"], 1)}) for x, y in calls))
    (tmp_path / "golden.npz").write_bytes(wrong.to_bytes())
    assert smoke(*arguments, "--golden", tmp_path / "golden.npz") == 1
    assert "digits: output output differs by" in capsys.readouterr().err
