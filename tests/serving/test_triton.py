"""Triton's core serves repositories as they were written: HTTP, gRPC, batching, and what it refuses."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import tritonclient.http
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import pn_compiler
from pn_compiler.repository.golden import Golden
from tests.serving import triton
from tests.serving.conftest import IMAGES, digits_network
from tests.serving.processes import children, free_ports, running, smoke, wait_for

pytestmark = pytest.mark.servers
CLIENT = Path(__file__).with_name("load_client.py")


class Server:
    """A running server: its process and addresses."""

    def __init__(self, process: "subprocess.Popen[bytes]", http: int, grpc: int) -> None:
        self.process, self.http, self.grpc = process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        self.client = tritonclient.http.InferenceServerClient(self.http)

    def ready(self) -> bool:
        assert self.process.poll() is None, "the server ended"
        try:
            return bool(self.client.is_server_ready())
        except OSError:
            return False

    def live(self) -> bool:
        assert self.process.poll() is None, "the server ended"
        try:
            return bool(self.client.is_server_live())
        except OSError:
            return False

    def statistics(self, model: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get_inference_statistics(model)["model_stats"][0]
        return found


@contextlib.contextmanager
def serving(repository: Path, log: Path, *options: str, ready: bool = True) -> Iterator[Server]:
    http, grpc = free_ports(2)
    command = triton.command(repository, http, grpc, *options)
    with running(command, log, env=triton.environment()) as process:
        server = Server(process, http, grpc)
        wait_for(server.ready if ready else server.live, "the server is ready")
        try:
            yield server
        finally:
            server.client.close()  # the server waits for open connections


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(repository, tmp_path_factory.mktemp("triton") / "log.txt") as found:
        yield found


def golden(repository: Path, model: str = "digits", version: int = 1) -> Path:
    return repository / model / str(version) / "golden.npz"


@pytest.mark.parametrize("model", ["digits", "pair"])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_smoke_of_an_unedited_repository(
    server: Server, repository: Path, model: str, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    address = getattr(server, protocol)
    assert smoke(address, "--golden", golden(repository, model), "--protocol", protocol) == 0
    assert capsys.readouterr().out.startswith(
        f"smoke: passed: {model} on {address} ({protocol}): largest error "
    )


def test_load_of_two_clients_and_batches_across_their_requests(server: Server, repository: Path) -> None:
    """1,000 requests of 1 to 16 samples, 32 at a time; the statistics show how Triton's core batched them."""
    before = server.statistics("digits")
    file = repository / "digits" / "1" / "model.onnx"
    clients = [
        subprocess.Popen(
            [sys.executable, CLIENT, protocol, getattr(server, protocol), "digits", file, "500", str(seed)],
            stdout=subprocess.PIPE,
        )
        for seed, protocol in enumerate(("http", "grpc"))
    ]
    reports = [json.loads(client.communicate(timeout=120)[0]) for client in clients]
    assert [each["answers"] for each in reports] == [500, 500]
    assert max(each["worst"] for each in reports) < 1e-5
    after = server.statistics("digits")
    samples = after["inference_count"] - before["inference_count"]
    executions = after["execution_count"] - before["execution_count"]
    assert samples == sum(each["samples"] for each in reports)
    assert executions < 1000  # requests shared a batch
    assert 16 < max(entry["batch_size"] for entry in after["batch_stats"]) <= 64  # more than any request


def test_config_is_what_tritons_own_schema_reads(repository: Path) -> None:
    text = (repository / "digits" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 64)
    assert [*config.input[0].dims] == [1, 8, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000


def without(line: str, replacement: str) -> Any:
    """Edits one line of config.pbtxt."""

    def edit(folder: Path) -> None:
        config = folder / "config.pbtxt"
        assert line in config.read_text()
        config.write_text(config.read_text().replace(line, replacement, 1))

    return edit


def corrupt(folder: Path) -> None:
    file = folder / "1" / "model.onnx"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_external_data(folder: Path) -> None:
    file = folder / "1" / "model.onnx"
    proto = onnx.load(file)
    file.unlink()
    file.mkdir()
    onnx.save(proto, file / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    (file / "model.onnx.data").unlink()


#: What someone did to the folder of a model, and the reason that the server tells, to clients or in its log.
REFUSED = {
    "gpu": (without("backend", "instance_group { kind: KIND_GPU } backend"), "no GPUs are available"),
    "batch_in_dims": (
        without("dims: 1\n", "dims: -1 dims: 1\n"),
        "[-1, -1, 1, 8, 8] TYPE_FP32 in config.pbtxt",
    ),
    "output": (without('"output"', '"logits"'), "output logits is none of ['output']"),
    "half": (
        without("TYPE_FP32", "TYPE_FP16"),
        "TYPE_FP16 in config.pbtxt, [-1, 1, 8, 8] TYPE_FP32 in the file",
    ),
    "corrupt": (corrupt, "Protobuf parsing failed"),
    "external": (lose_external_data, "model.onnx.data failed:"),
}
UNREADABLE = {
    "name": (
        without("max_batch", 'name: "other" max_batch'),
        "unexpected directory name 'name' for model 'other'",
    ),
    "field": (without("max_batch_size: 64", "max_batch: 64"), 'has no field named "max_batch"'),
    "datatype": (without("TYPE_FP32", "FP32"), 'Unknown enumeration value of "FP32"'),
    "preferred": (
        without("dynamic_batching {", "dynamic_batching { preferred_batch_size: 128"),
        "dynamic batching preferred size must be <= max batch size",
    ),
}


def test_what_is_broken_is_refused_with_its_reason(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, log = tmp_path / "model_repository", tmp_path / "log.txt"
    for name, (break_it, _) in (REFUSED | UNREADABLE).items():
        shutil.copytree(repository / "digits", folder / name)
        break_it(folder / name)
    shutil.copytree(repository / "digits", folder / "digits")
    with serving(folder, log, "--exit-on-error=false", ready=False) as server:
        assert (
            smoke(server.http, "--golden", golden(repository), "--wait", 30) == 0
        )  # the others suffer nothing
        capsys.readouterr()
        for name in REFUSED | UNREADABLE:
            for protocol in ("http", "grpc"):
                address = getattr(server, protocol)
                arguments = ("--golden", golden(repository), "--protocol", protocol, "--model", name)
                assert smoke(address, *arguments) == 1
                message = capsys.readouterr().err
                assert message.startswith(f"smoke: error: {address}: model {name} is not ready")
                assert message.count("\n") == 1
                if name in REFUSED:
                    assert REFUSED[name][1] in message
        for _, reason in UNREADABLE.values():
            assert reason in log.read_text()


def changed(golden: Golden, change: str) -> Golden:
    """A golden file that does not fit the server."""
    if change == "values":
        calls = tuple((x, {name: y + 0.01 for name, y in outputs.items()}) for x, outputs in golden.calls)
        return dataclasses.replace(golden, version=7, calls=calls)
    edit = {
        "dtype": lambda x: {"x": x["x"].astype(np.float64)},
        "shape": lambda x: {"x": x["x"][:, :, :4]},
        "rank": lambda x: {"x": x["x"][0]},
        "input name": lambda x: {"image": x["x"]},
    }[change]
    return dataclasses.replace(golden, calls=tuple((edit(x), y) for x, y in golden.calls))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("values", "limit 1.0e-04) (it serves version 1, the golden file is of 7)"),
        ("dtype", "digits: input x is FP32, the golden one FP64"),
        ("shape", "digits: input x has shape [-1, 1, 8, 8], the golden one [3, 1, 4, 8]"),
        ("rank", "digits: input x has shape [-1, 1, 8, 8], the golden one [1, 8, 8]"),
        ("input name", "digits: the server's inputs are x, not image"),
    ],
)
def test_a_golden_file_that_does_not_fit(
    server: Server, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    change: str, message: str, protocol: str,
) -> None:  # fmt: skip
    file = tmp_path / "golden.npz"
    file.write_bytes(changed(Golden.load(golden(repository)), change).to_bytes())
    assert smoke(getattr(server, protocol), "--golden", file, "--protocol", protocol) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_golden_file_of_another_model(
    server: Server, repository: Path, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    address = getattr(server, protocol)
    arguments = ("--golden", golden(repository, "pair"), "--protocol", protocol)
    assert smoke(address, *arguments, "--model", "digits") == 1
    assert "the server's inputs are x, not signal_in, marks_in" in capsys.readouterr().err
    assert smoke(address, *arguments, "--model", "absent") == 1
    assert "there is no model absent; the server has digits, pair" in capsys.readouterr().err


def test_a_port_in_use(server: Server, repository: Path) -> None:
    port = int(server.http.rpartition(":")[2])
    command = triton.command(repository, port, *free_ports(1), "--model-control-mode=explicit")
    done = subprocess.run(
        command, env=triton.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert f"Socket '127.0.0.1:{port}' already in use" in done.stdout + done.stderr
    assert server.ready()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_that_dies_or_hangs_while_it_is_asked(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    folder = tmp_path / "model_repository"
    shutil.copytree(repository / "digits", folder / "digits")
    slow = "dynamic_batching { preferred_batch_size: 64 max_queue_delay_microseconds: 60000000"
    without("dynamic_batching {\n  max_queue_delay_microseconds: 2000", slow)(folder / "digits")
    with serving(folder, tmp_path / "log.txt") as server:
        address = getattr(server, protocol)
        backends = children(server.process.pid)
        arguments = (address, "--golden", golden(repository), "--protocol", protocol)
        assert smoke(*arguments, "--timeout", 1) == 1
        assert f"{address}: no answer within 1 s (batch of 1)" in capsys.readouterr().err
        threading.Timer(1, server.process.kill).start()
        assert smoke(*arguments) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"smoke: error: {address} closed the connection (batch of 1): ")
        assert message.count("\n") == 1
        for pid in backends:  # which nobody ended
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_new_version_under_a_running_server(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Triton polls the folder while a second version with other weights is written into it."""
    folder = tmp_path / "model_repository"
    shutil.copytree(repository / "digits", folder / "digits")
    options = ("--model-control-mode=poll", "--repository-poll-secs=1")
    with serving(folder, tmp_path / "log.txt", *options) as server:
        assert smoke(server.http, "--golden", golden(folder)) == 0
        other = digits_network()
        with torch.no_grad():
            other.head.bias.add_(1)
        report = pn_compiler.export_model_repository(other, folder, "digits", IMAGES, max_batch_size=64)
        assert Path(report.repository) == folder / "digits" / "2"
        new = golden(folder, version=2)
        wait_for(lambda: smoke(server.http, "--golden", new) == 0, "version 2 is served")
        assert smoke(server.http, "--golden", golden(folder)) == 1
        assert "(it serves version 2, the golden file is of 1)" in capsys.readouterr().err
