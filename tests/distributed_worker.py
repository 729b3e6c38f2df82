"""One of two processes that train the same converted network, for tests/test_distributed.py.

Usage: python -m tests.distributed_worker RANK FOLDER. Process 0 writes what each way of training gave into
FOLDER/results.pt: the gradients of the second of two steps on a joint batch, half of it on each process.
"""

import datetime
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.training_step import by_blocks, loss_of, network

PROCESSES = 2


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=generator)


def sharded(name: str, *, blocks: bool, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    model, paths = by_blocks(name) if blocks else (network(name), [])
    model = model.double()
    for path in (*paths, ""):
        fully_shard(model.get_submodule(path), mp_policy=policy or MixedPrecisionPolicy())
    return model


def parallel(name: str, **options: bool) -> nn.Module:
    return DistributedDataParallel(network(name).double(), **options)


WAYS: dict[str, Callable[[str], nn.Module]] = {
    "DDP": parallel,
    "DDP, static graph": lambda name: parallel(name, static_graph=True),
    "DDP, buckets as views": lambda name: parallel(name, gradient_as_bucket_view=True),
    "FSDP2": lambda name: sharded(name, blocks=False),
    "FSDP2 of each block": lambda name: sharded(name, blocks=True),
    "FSDP2 of each block in bfloat16": lambda name: sharded(
        name,
        blocks=True,
        policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    ),
}

#: the second network takes those that differ most
PAIRS = [
    *(("test_resnet", way) for way in WAYS),
    *(("test_efficientnet", way) for way in ("DDP", "FSDP2 of each block")),
]


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the second of two steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        gradients[name.removeprefix("module.")] = whole
    return gradients


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    share = batch().chunk(PROCESSES)[rank]
    results = {(name, way): trained(WAYS[way](name), share) for name, way in PAIRS}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
