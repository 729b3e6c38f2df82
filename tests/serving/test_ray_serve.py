"""The Ray Serve application on two nodes, under load, while replicas and a node die and a version changes."""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import pn_compiler
from examples.digits_network import DigitsNet
from pn_compiler.testing import randomize_batch_norms
from tests.serving.ray_cluster import ROOT, Cluster, cluster, free_port, wait_for

serve: Any = importlib.import_module("ray.serve")
REPLICA = "ServeReplica:default:Models"
USERS = 16  # of each client process
TEMPLATE = ROOT / "pn_compiler" / "repository" / "templates" / "ray_app.py"


class Served(NamedTuple):
    url: str
    app: ModuleType
    files: list[Path]  # of versions 1 and 2, of which the second is not in the repository at first
    repository: Path
    cluster: Cluster

    def deploy(self) -> None:
        options = {"min_replicas": 2, "max_replicas": 2, "cpus": 0.3}
        serve.run(self.app.app(self.app.Options(**options, health_period_s=2, health_timeout_s=5)))

    def replicas(self) -> list[list[int]]:
        """Process of each running replica, by node."""
        return [node.pids(REPLICA) for node in self.cluster.nodes]

    def processes(self) -> set[int]:
        return {pid for pids in self.replicas() for pid in pids}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """A network, compiled, and one with other biases at its end."""
    folder = tmp_path_factory.mktemp("files")
    made = [folder / "1.onnx", folder / "2.onnx"]
    torch.manual_seed(1)
    converted = pn_compiler.transform(randomize_batch_norms(DigitsNet()).eval())
    pn_compiler.export_onnx(converted, made[0], torch.randn(1, 1, 8, 8))
    other = onnx.load(made[0])
    (bias,) = (tensor for tensor in other.graph.initializer if tensor.dims == [10])
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(other, made[1])
    return made


@pytest.fixture(scope="module")
def served(files, tmp_path_factory):
    repository = tmp_path_factory.mktemp("repository")
    add_version(repository, 1, files[0])
    (repository / "sums" / "1").mkdir(parents=True)
    (repository / "sums" / "1" / "model.onnx").write_bytes(sums().SerializeToString())
    shutil.copy(TEMPLATE, repository)
    port = free_port()
    environment = {"PYTHONPATH": str(repository), "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0"}
    with pytest.MonkeyPatch.context() as patch, cluster(1, 1, **environment) as made:
        patch.syspath_prepend(repository)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        found = Served(
            f"http://127.0.0.1:{port}", importlib.import_module("ray_app"), files, repository, made
        )
        found.deploy()
        yield found


def sums() -> onnx.ModelProto:
    """x [batch, n] times ones [4, 2]: that n must be 4 does not stand in the shape."""
    nodes = [onnx.helper.make_node("MatMul", ["x", "ones"], ["y"])]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", "n"]) for name in "xy")
    ones = onnx.numpy_helper.from_array(np.ones((4, 2), np.float32), "ones")
    graph = onnx.helper.make_graph(nodes, "sums", [x], [y], [ones])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def add_version(repository: Path, version: int, file: Path) -> None:
    folder = repository / "digits" / str(version)
    folder.mkdir(parents=True)
    shutil.copy(file, folder / "model.onnx")


class Load:
    """Two client processes; `stop` lets them finish what they have begun."""

    def __init__(self, served: Served, *arguments: str) -> None:
        command = [sys.executable, "examples/ray_client.py", served.url, "digits", *map(str, served.files)]
        self.processes = [
            subprocess.Popen(
                [*command, *arguments, f"--seed={seed}"],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for seed in (1, 2)
        ]  # fmt: skip

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def stop(self) -> dict[str, Any]:
        """What both report, added up."""
        total: dict[str, Any] = {}
        for process in self.processes:
            report = json.loads(process.communicate(timeout=200)[0])
            for key, value in report.items():
                if key in ("answered", "retried", "lost", "wrong"):
                    total[key] = total.get(key, 0) + value
                else:
                    total.setdefault(key, []).append(value)
        return total


def show(capsys, *values: object) -> None:
    """Figures for docs/ray.md."""
    with capsys.disabled():
        sys.stdout.write(" ".join(map(str, ("\n ", *values))))


def healthy(report: dict[str, Any], served: Served) -> None:
    assert report["lost"] == report["wrong"] == 0, report
    assert max(report["largest_error"]) < 1e-5, report
    names = {name for names in report["replicas"] for name in names}
    assert len(names) >= 2, report


def test_a_thousand_requests_at_once(served, capsys) -> None:
    assert [len(pids) for pids in served.replicas()] == [1, 1]
    start = time.monotonic()
    with Load(served, "--requests=500") as load:
        report = load.stop()
    show(capsys, f"{time.monotonic() - start:.1f} s", report)
    healthy(report, served)
    assert (report["answered"], report["retried"]) == (1000, 0)
    assert max(report["largest_batch"]) > 1


def test_the_client_sees_wrong_answers(served) -> None:
    """It compares with the other network."""
    with Load(served._replace(files=served.files[::-1]), "--requests=5") as load:
        report = load.stop()
    assert (report["answered"], report["wrong"]) == (10, 10)


def ask(served: Served, path: str, body: object = None) -> tuple[int, Any]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(served.url + path, data)) as response:
            content = response.read()
            return response.status, json.loads(content) if content else None
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def test_the_protocol(served) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/digits/ready"):
        assert ask(served, path) == (200, None)
    status, about = ask(served, "/v2/models/digits/versions/1")
    assert (status, about["name"], about["versions"]) == (200, "digits", ["1"])
    (x,), (y,) = about["inputs"], about["outputs"]
    assert (x["datatype"], x["shape"], y["shape"]) == ("FP32", [-1, 1, 8, 8], [-1, 10])

    for rows in (1, 5, 40):  # the last is larger than a batch of the server
        images = np.random.default_rng(rows).random((rows, 1, 8, 8), dtype=np.float32)
        tensor = {"name": x["name"], "datatype": "FP32", "shape": images.shape}
        call = {"id": "7", "inputs": [tensor | {"data": images.ravel().tolist()}]}
        status, answer = ask(served, "/v2/models/digits/infer", call)
        expected = onnxruntime.InferenceSession(served.files[0]).run(None, {x["name"]: images})[0]
        assert (status, answer["id"], answer["model_version"]) == (200, "7", "1")
        (output,) = answer["outputs"]
        assert output["shape"] == [rows, 10]
        assert np.allclose(np.reshape(output["data"], (rows, 10)), expected, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused_in_words(served) -> None:
    name = ask(served, "/v2/models/digits")[1]["inputs"][0]["name"]
    zeros = {"name": name, "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0.0] * 64}
    for change, message in (
        ({"name": "pixels"}, "has the inputs"),
        ({"datatype": "FP64"}, f"{name} is FP32, and float64 was sent"),
        ({"datatype": "FLOAT"}, "not one of the Open Inference Protocol"),
        ({"shape": [1, 64]}, f"{name} has the shape [-1, 1, 8, 8], and [1, 64] was sent"),
        ({"shape": [2, 1, 8, 8]}, "not one of the Open Inference Protocol"),
        ({"shape": [0, 1, 8, 8], "data": []}, "expected one number above 0"),
    ):
        status, error = ask(served, "/v2/models/digits/infer", {"inputs": [zeros | change]})
        assert (status, message in error) == (400, True), error
    status, error = ask(served, "/v2/models/digits/infer", b"{")
    assert (status, "not one of the Open Inference Protocol" in error) == (400, True)
    call = {"inputs": [zeros], "outputs": [{"name": "wrong"}]}
    assert "has the outputs" in ask(served, "/v2/models/digits/infer", call)[1]
    assert ask(served, "/v2/models/letters") == (
        404,
        "there is no model letters: this server has digits, sums",
    )
    wide = {"name": "x", "datatype": "FP32", "shape": [1, 5], "data": [0.0] * 5}
    status, error = ask(served, "/v2/models/sums/infer", {"inputs": [wide]})  # only onnxruntime can know
    assert (status, "onnxruntime does not run sums on this" in error) == (400, True), error
    status, answer = ask(
        served, "/v2/models/sums/infer", {"inputs": [wide | {"shape": [1, 4], "data": [1] * 4}]}
    )
    assert (status, answer["outputs"][0]["data"]) == (200, [4, 4])
    assert ask(served, "/v2/models/digits/versions/9/ready")[0] == 404
    assert ask(served, "/v1/models")[0] == 404


def test_a_file_that_does_not_load_is_never_deployed(served) -> None:
    folder = served.repository / "digits" / "3" / "model.onnx"  # where weights are in a file of their own
    folder.mkdir(parents=True)
    model = onnx.load(served.files[0])
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="weights", size_threshold=1024
    )
    try:
        served.app.Model("digits", 3, 1).probe()
        (folder / "weights").unlink()
        with pytest.raises(RuntimeError, match="digits version 3 does not load"):
            served.deploy()
        shutil.rmtree(folder)
        content = served.files[0].read_bytes()
        folder.write_bytes(content[: len(content) // 2])
        with pytest.raises(RuntimeError, match="digits version 3 does not load"):
            served.deploy()
        assert ask(served, "/v2/models/digits/ready") == (200, None)
        assert ask(served, "/v2/models/digits")[1]["versions"] == ["1"]
    finally:
        shutil.rmtree(folder.parent)


def test_a_node_dies_under_load(served, capsys) -> None:
    """The other node answers on, and starts a replica in the place of the lost one."""
    with Load(served, f"--users={USERS}") as load:
        time.sleep(3)
        assert [len(pids) for pids in served.replicas()] == [1, 1]
        served.cluster.nodes[1].kill()
        seconds = wait_for(lambda: len(served.replicas()[0]) == 2, 120)
        time.sleep(3)
        report = load.stop()
    show(capsys, f"replaced in {seconds:.1f} s:", report)
    healthy(report, served)
    assert len({name for names in report["replicas"] for name in names}) == 3  # both, and the new one
    assert report["retried"] <= 2 * USERS  # those in flight
    assert report["answered"] > 100
    wait_for(lambda: served.cluster.alive() == 1, 120)


def test_a_replica_dies_under_load(served, capsys) -> None:
    with Load(served, f"--users={USERS}") as load:
        time.sleep(3)
        old = served.processes()
        os.kill(min(old), signal.SIGKILL)
        seconds = wait_for(lambda: len(served.processes() - old) == 1, 120)
        time.sleep(3)
        report = load.stop()
    show(capsys, f"replaced in {seconds:.1f} s:", report)
    healthy(report, served)
    assert report["retried"] <= 2 * USERS
    assert report["answered"] > 100


def test_a_new_version_without_a_failed_request(served, capsys) -> None:
    with Load(served, f"--users={USERS}") as load:
        time.sleep(3)
        add_version(served.repository, 2, served.files[1])
        start = time.monotonic()
        served.deploy()
        seconds = time.monotonic() - start
        time.sleep(3)
        report = load.stop()
    show(capsys, f"rolled in {seconds:.1f} s:", report)
    healthy(report, served)
    assert report["retried"] == 0
    assert {version for versions in report["versions"] for version in versions} == {"1", "2"}
    assert ask(served, "/v2/models/digits")[1]["versions"] == ["2"]


def test_a_replica_that_hangs_is_replaced(served, capsys) -> None:
    """Its health checks are not answered."""
    old = served.processes()
    os.kill(min(old), signal.SIGSTOP)
    seconds = wait_for(lambda: len(served.processes() - old) == 1, 120)
    show(capsys, f"replaced in {seconds:.1f} s")
    with Load(served, "--requests=20") as load:
        report = load.stop()
    assert (report["answered"], report["retried"], report["wrong"]) == (40, 0, 0)


def test_a_port_in_use() -> None:
    """Ray Serve does not start, and says why."""
    program = (
        "import ray, sys\n"
        "from ray import serve\n"
        "ray.init('local', num_cpus=2, include_dashboard=False, _node_ip_address='127.0.0.1')\n"
        "serve.start(http_options={'host': '127.0.0.1', 'port': int(sys.argv[1])})\n"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-c", program, str(port)],
            capture_output=True, text=True, check=False, timeout=120,
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        )  # fmt: skip
    assert done.returncode == 1
    assert f"RuntimeError: Failed to bind to address '127.0.0.1:{port}'" in done.stderr
