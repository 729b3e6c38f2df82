"""Settings for all tests: one thread in each process, and nothing done again that is the same each time."""

import copy
import functools
import gc
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for child processes

import pytest
import torch._export.utils
from torch.export import exported_program
from torch.onnx._internal.exporter._registration import ONNXRegistry


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from going through the million objects that were imported."""
    gc.set_threshold(10_000, 10, 10)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def what_a_file_leaves_is_not_searched_again() -> Iterator[None]:
    """After the first export there are so many objects more that a collection takes 0.3 seconds.

    Tests that look for what was left begin with one each.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def operators_are_read_once() -> Iterator[None]:
    """torch.onnx parses the source of all its operators for each export: half of the time of a small one."""
    read = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*args: int, **options: int) -> ONNXRegistry:
        registry = copy.copy(read(*args, **options))
        registry.functions = {target: [*known] for target, known in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture(scope="session", autouse=True)
def composite_operators_are_prepared_once() -> Iterator[None]:
    """torch.export lists all composite operators, and overrides them for twenty devices: a third of its time.

    Here they are listed once, and overridden for the devices that tests use.
    """
    with pytest.MonkeyPatch.context() as patch:
        listed = functools.cache(torch._export.utils._materialize_cpp_cia_ops)
        patch.setattr(torch._export.utils, "_materialize_cpp_cia_ops", listed)
        for name in ("_BACKEND_KEYS_TO_OVERRIDE", "_AUTOGRAD_ALIAS_BACKEND_KEYS_TO_OVERRIDE"):
            keys = [k for k in getattr(exported_program, name) if k.name.endswith(("CPU", "CUDA", "Meta"))]
            patch.setattr(exported_program, name, keys)
        yield
