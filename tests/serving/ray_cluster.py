"""A Ray cluster of several nodes on this machine, each of which can be killed whole.

Importing this module skips the tests where Ray is not installed, and sets what Ray reads once, at its own
import: nodes and drivers of a cluster need the same token.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serving.ray_watchdog import kill, marked, watch

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAY_USAGE_STATS_ENABLED": "0"}
ray = pytest.importorskip("ray", reason="make test-ray makes the environment that has it")
watch()

ROOT = Path(__file__).parent.parent.parent
MARK = "PN_COMPILER_RAY_NODE"  # in the environment of the processes of a node


class Node:
    """The processes that `ray start` makes; `head` is the node to join, None for the first one."""

    def __init__(self, folder: Path, cpus: int, head: "Node | None" = None, **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        self.address = head.address if head else f"127.0.0.1:{free_port()}"
        role = (
            [f"--address={self.address}"]
            if head
            else ["--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false"]
            + [f"--temp-dir={folder}"]
        )
        command = [
            *(Path(sys.executable).with_name("ray"), "start", "--block", *role, "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--object-store-memory=100000000"),
            *("--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"),
        ]
        self.log = folder / f"node-{self.mark[:8]}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | environment | {MARK: self.mark}, stdout=log, stderr=log
            )

    def pids(self, title: str = "") -> list[int]:
        """Processes of this node whose command line holds `title`."""
        return marked(MARK, self.mark, title)

    def kill(self) -> None:
        """SIGKILL to every process of it, as when a machine loses power."""
        kill(MARK, self.mark, self.process)


class Cluster:
    """Nodes, the first of which is the head, and this process as the driver."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.nodes: list[Node] = []

    def add(self, cpus: int) -> Node:
        node = Node(self.folder, cpus, self.nodes[0] if self.nodes else None, **self.environment)
        self.nodes.append(node)
        return node

    def connect(self) -> None:
        """Waits for all nodes."""

        def connected() -> bool:
            for node in self.nodes:
                assert node.process.poll() is None, node.log.read_text()
            if not ray.is_initialized():
                with contextlib.suppress(ConnectionError):
                    ray.init(self.nodes[0].address, _node_ip_address="127.0.0.1", log_to_driver=False)
            return ray.is_initialized() and self.alive() == len(self.nodes)

        wait_for(connected, 120)

    def alive(self) -> int:
        return sum(node["Alive"] for node in ray.nodes())


@contextlib.contextmanager
def cluster(*cpus: int, **environment: str) -> Iterator[Cluster]:
    """A cluster with a node for each number of `cpus`; all of its processes are gone at the end."""
    with tempfile.TemporaryDirectory(prefix="pnray", ignore_cleanup_errors=True) as folder:
        made = Cluster(Path(folder), environment)
        try:
            made.add(cpus[0])
            wait_for(lambda: "Ray runtime started" in made.nodes[0].log.read_text(), 120)
            for count in cpus[1:]:
                made.add(count)
            made.connect()
            yield made
        finally:
            ray.shutdown()
            for node in reversed(made.nodes):
                node.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until `condition` holds. Fails after `seconds`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not so after {seconds} s"
        time.sleep(0.1)
    return time.monotonic() - start
