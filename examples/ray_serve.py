"""Serves the digits model with Ray: replicas, batching, autoscaling, health, and a new version under load.

    make demo .venv-ray/.installed && .venv-ray/bin/python examples/ray_serve.py

Takes about a minute, on this machine alone: docs/ray.md has the commands for a cluster.
"""

import asyncio
import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray_client import Client, ask_all, ask_until

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "pn_compiler" / "repository" / "templates" / "ray_app.py"
DEMO = ROOT / "demo_output"
PORT = 8000
USERS = 60


def add_version(repository: Path, version: int, file: Path) -> None:
    """As `pn-compile --model-repository` does."""
    folder = repository / "digits" / str(version)
    folder.mkdir(parents=True)
    shutil.copy(file, folder / "model.onnx")


def deploy(app: Any) -> None:
    """The newest versions, in one to three replicas; those that run are replaced one by one."""
    options = app.Options(
        min_replicas=1, max_replicas=3, target_ongoing_requests=10, upscale_delay_s=1, cpus=0.5
    )
    serve.run(app.app(options))


def replicas() -> str:
    states = serve.status().applications["default"].deployments["Models"].replica_states
    return ", ".join(f"{count} {state.lower()}" for state, count in states.items())


def show_report(title: str, client: Client) -> None:
    report = client.report()
    versions = ", ".join(f"{count} by version {version}" for version, count in report["versions"].items())
    print(
        f"{title}: {report['answered']} answered ({versions}; {len(report['replicas'])} replicas, up to "
        f"{report['largest_batch']} in a batch, median {report['median_ms']:.0f} ms), "
        f"{report['retried']} retried, {report['lost']} lost, {report['wrong']} wrong"
    )


async def show(repository: Path, app: Any) -> None:
    def new_client() -> Client:
        return Client(f"http://127.0.0.1:{PORT}", "digits", [DEMO / "model.onnx", DEMO / "tuned.onnx"])

    print(f"replicas: {replicas()}")
    client = new_client()
    await ask_all(client, 200, seed=0)
    show_report("200 requests at once", client)

    client, stop, start = new_client(), asyncio.Event(), time.monotonic()
    load = asyncio.create_task(ask_until(client, stop, users=USERS, seed=1))
    while "3 running" not in replicas() and time.monotonic() - start < 60:
        await asyncio.sleep(1)
    print(f"{USERS} users: {replicas()} after {time.monotonic() - start:.0f} s")

    add_version(repository, 2, DEMO / "tuned.onnx")
    start = time.monotonic()
    await asyncio.to_thread(deploy, app)
    print(f"version 2 in the place of version 1 after {time.monotonic() - start:.0f} s: {replicas()}")
    stop.set()
    await load
    show_report("under this load", client)
    assert client.counts["lost"] == client.counts["wrong"] == 0


def main() -> int:
    if not (DEMO / "tuned.onnx").exists():
        print(f"ray_serve: there is no {DEMO / 'tuned.onnx'}: run `make demo` first", file=sys.stderr)
        return 1
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        add_version(repository, 1, DEMO / "model.onnx")
        shutil.copy(TEMPLATE, repository)
        sys.path.insert(0, folder)
        try:
            ray.init(
                "local",
                num_cpus=2,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": {"PYTHONPATH": folder}},
            )
            app = importlib.import_module("ray_app")
            serve.start(
                http_options={"host": "127.0.0.1", "port": PORT}, logging_config={"log_level": "ERROR"}
            )
            deploy(app)
            asyncio.run(show(repository, app))
        finally:
            ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
