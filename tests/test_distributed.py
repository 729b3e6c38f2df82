"""Two real processes train as one process does on the joint batch."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed_worker import PAIRS, PROCESSES, batch, trained
from tests.training_step import by_blocks, distance, network

ROOT = Path(__file__).parents[1]
Results = dict[tuple[str, str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed_worker", str(rank), str(folder)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(PROCESSES)
    ]  # fmt: skip
    try:
        logs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in processes), "\n".join(logs)
    assert "unused parameters" not in "".join(logs)
    loaded: Results = torch.load(folder / "results.pt")
    return loaded


@functools.cache
def alone(name: str, *, blocks: bool) -> dict[str, Tensor]:
    """Gradients of one process."""
    model = by_blocks(name)[0] if blocks else network(name)
    return trained(model.double(), batch())


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_gradients_equal_those_of_one_process(name: str, way: str, results: Results) -> None:
    # bfloat16 rounds weights and activations to 8 bits, and a rounding that crosses the bend of a ReLU
    # changes its slope by 1: see `bounds` in tests/test_training.py
    limit = 0.3 if "bfloat16" in way else 1e-13
    assert distance(results[name, way], alone(name, blocks="block" in way)) < limit
