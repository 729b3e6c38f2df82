"""Calibration on the machines of a Ray cluster.

The sums of a calibration are additive: each shard of a Ray Dataset is summed up where it is, and the sums
are merged, which gives what one process gives, to rounding::

    batches = RayBatches(ray.data.read_parquet("s3://..."), column="image")
    converted = pn_compiler.transform(model, warm_start="calibrate", calibration=batches)

The constants of each normalizer on its own are additive, too: `static_statistics`. Those that
`freeze_statistics` finds in the end are not, because a site makes up for errors of those before it, batch by
batch; given `RayBatches`, it reads them into memory here, up to its `max_samples`.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import ray
import torch
from torch import nn

from pn_compiler.base.errors import ConfigError, PnCompilerError
from pn_compiler.freezing.site_constants import Constants, solved, sums
from pn_compiler.nn import FoldedNorm
from pn_compiler.numerics.least_squares import ChannelFit, merged
from pn_compiler.running.evaluation import Shards, each_batch, untouched

T = TypeVar("T")


class RayBatches(Shards):
    """Batches of a Ray Dataset, one shard for each worker.

    The Dataset is read once, into the object store of the cluster.

    Args:
        dataset: its columns are arguments of the forward, by name; a single one is the first argument.
        column: the one column that is the first argument, if there are others.
        batch_size: rows.
        workers: shards, each summed up by a process. Without it one for each CPU of the cluster.
        cpus: of a worker, which computes with as many threads.

    Raises:
        ConfigError: the Dataset has no row or no such column, or a number is below 1.
    """

    def __init__(
        self,
        dataset: "ray.data.Dataset",
        *,
        column: str | None = None,
        batch_size: int = 32,
        workers: int | None = None,
        cpus: int = 1,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("workers", workers), ("cpus", cpus)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: expected 1 or more")
        dataset = dataset.materialize()
        rows, columns = dataset.count(), dataset.columns() or []
        if not rows:
            raise ConfigError("the Dataset has no row")
        if column is not None and column not in columns:
            raise ConfigError(f"the Dataset has no column {column}: it has {', '.join(columns)}")
        self.column = columns[0] if len(columns) == 1 else column
        self.batch_size, self.cpus = batch_size, cpus
        count = workers or int(ray.cluster_resources().get("CPU", 1)) // cpus or 1
        size = batch_size * math.ceil(rows / batch_size / count)  # whole batches, as in one process
        cuts = list(range(size, rows, size))
        self.dataset = dataset
        self.shards = dataset.split_at_indices(cuts) if cuts else [dataset]
        for part in (dataset, *self.shards):
            part.context.enable_progress_bars = False  # of what is in memory

    def __iter__(self) -> Iterator[Any]:
        return _batches(self.dataset, self.column, self.batch_size)

    def each(self, function: Callable[[Iterable[Any]], T]) -> list[T]:
        shared = ray.put(function)  # the networks travel once to each machine
        worker = ray.remote(num_cpus=self.cpus)(_on_shard)
        tasks = [
            worker.remote(shared, shard, self.column, self.batch_size, self.cpus) for shard in self.shards
        ]
        try:
            return list(ray.get(tasks))
        except ray.exceptions.RayTaskError as error:
            # the other shards go on to their end: to cancel a task that is just ending crashes Ray
            if isinstance(error.cause, PnCompilerError):
                raise error.cause from None
            raise
        except KeyboardInterrupt:
            for task in tasks:
                ray.cancel(task)
            raise


def static_statistics(network: nn.Module, batches: RayBatches) -> Constants:
    """Scale and shift of each ``nn.GroupNorm`` or FoldedNorm of `network` on its own, by path.

    They are the least squares of its output on its input, per channel [C], as the first step of
    `pn_compiler.freeze_statistics` takes them, over all `batches`.

    Args:
        network: a result of `pn_compiler.fold`.
        batches: the data.

    Raises:
        ConfigError: the network does not run on a batch, or values are nan or infinite.
    """
    norms: Any = {
        name: norm for name, norm in network.named_modules() if type(norm) in (nn.GroupNorm, FoldedNorm)
    }
    parts = batches.each(functools.partial(_static_sums, network, tuple(norms)))
    return solved(norms, merged(parts))


def _static_sums(
    network: nn.Module, names: tuple[str, ...], batches: Iterable[Any]
) -> Mapping[str, ChannelFit]:
    norms: Any = {name: network.get_submodule(name) for name in names}
    with untouched(network):
        return sums(network, norms, (inputs for _, inputs in each_batch(network, batches, "statistics")))


def _on_shard(
    function: Callable[[Iterable[Any]], T],
    shard: "ray.data.Dataset",
    column: str | None,
    batch_size: int,
    threads: int,
) -> T:
    torch.set_num_threads(threads)
    return function(_batches(shard, column, batch_size))


def _batches(dataset: "ray.data.Dataset", column: str | None, batch_size: int) -> Iterator[Any]:
    """The values of one column, or a mapping of all."""
    for batch in dataset.iter_torch_batches(batch_size=batch_size):
        yield batch if column is None else batch[column]
