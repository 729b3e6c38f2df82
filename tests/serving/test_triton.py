"""Triton's core serves repositories as they were written: HTTP, gRPC, batching, and what it refuses."""

import contextlib
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
import tritonclient.http
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import pn_compiler
from pn_compiler.golden import Golden
from tests.serving import triton
from tests.serving.conftest import IMAGES, digits_network
from tests.serving.processes import children, free_ports, running, smoke, wait_for

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
        yield server


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
    assert capsys.readouterr().out.startswith(f"smoke: passed: {model} on {address} ({protocol}): largest error ")


def test_load_of_two_clients_and_batches_across_their_requests(server: Server, repository: Path) -> None:
    """1,000 requests of 1 to 16 samples, 32 at a time; the statistics tell how Triton's core batched them."""
    before = server.statistics("digits")
    file = repository / "digits" / "1" / "model.onnx"
    clients = [
        subprocess.Popen(
            [sys.executable, CLIENT, protocol, getattr(server, protocol), "digits", file, "500", str(seed)],
            stdout=subprocess.PIPE,
        )
        for seed, protocol in enumerate(("http", "grpc"))
    ]
    told = [json.loads(client.communicate(timeout=120)[0]) for client in clients]
    assert [each["answers"] for each in told] == [500, 500]
    assert max(each["worst"] for each in told) < 1e-5
    after = server.statistics("digits")
    samples = after["inference_count"] - before["inference_count"]
    executions = after["execution_count"] - before["execution_count"]
    assert samples == sum(each["samples"] for each in told)
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


#: What someone did to the folder of a model, and what the server says of it.
BROKEN = {
    "name": (without("max_batch", 'name: "other" max_batch'), "expected model name"),
    "field": (without("max_batch_size: 64", "max_batch: 64"), "failed to load"),
    "datatype": (without("TYPE_FP32", "FP32"), "failed to load"),
    "preferred": (
        without("dynamic_batching {", "dynamic_batching { preferred_batch_size: 128"),
        "dynamic batching preferred size must be <= max batch size",
    ),
    "gpu": (without("backend", "instance_group { kind: KIND_GPU } backend"), "GPU"),
    "batch_in_dims": (without("dims: 1\n", "dims: -1 dims: 1\n"), "[-1, -1, 1, 8, 8] TYPE_FP32 in config.pbtxt"),
    "output": (without('"output"', '"logits"'), "output logits is none of ['output']"),
    "half": (without("TYPE_FP32", "TYPE_FP16"), "TYPE_FP16 in config.pbtxt"),
    "corrupt": (corrupt, "Protobuf parsing failed"),
    "external": (lose_external_data, "model.onnx.data"),
}  # fmt: skip


def test_what_is_broken_is_refused_with_its_reason(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model_repository"
    for name, (break_it, _) in BROKEN.items():
        shutil.copytree(repository / "digits", folder / name)
        break_it(folder / name)
    shutil.copytree(repository / "digits", folder / "digits")
    with serving(folder, tmp_path / "log.txt", "--exit-on-error=false", ready=False) as server:
        assert smoke(server.http, "--golden", golden(repository), "--wait", 30) == 0
        capsys.readouterr()
        for name, (_, reason) in BROKEN.items():
            for protocol in ("http", "grpc"):
                address = getattr(server, protocol)
                arguments = ("--golden", golden(repository), "--protocol", protocol, "--model", name)
                assert smoke(address, *arguments) == 1
                message = capsys.readouterr().err
                assert message.startswith(f"smoke: error: {address}: model {name} is not ready")
                assert message.count("\n") == 1
                assert reason in message or reason in (tmp_path / "log.txt").read_text()
