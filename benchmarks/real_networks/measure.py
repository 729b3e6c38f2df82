"""The networks of the benchmark with their data, and one row of its table."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.real_networks import data, networks
from benchmarks.real_networks.data import Inputs, Options, Split
from benchmarks.real_networks.figures import CLASSES, PITCHES, Figures, bernoulli
from benchmarks.real_networks.variants import BATCH, VARIANTS
from benchmarks.tasks import Row


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A network and its data.

    Attributes:
        load: the network with BatchNorm, in eval mode.
        splits: its samples.
        needs: the options without which it is left out.
        figures: what is measured.
        distillation: options of `pn_compiler.distill`.
    """

    load: Callable[[Options], nn.Module]
    splits: Callable[[Options], list[Split]]
    needs: tuple[str, ...]
    figures: Figures = CLASSES
    distillation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _lite(size: int, pixels: int) -> Task:
    return Task(
        lambda options: networks.efficientnet_lite(size),
        lambda options: data.imagenet(options, pixels),
        ("images",),
    )


def _resnet(depth: int) -> Task:
    return Task(
        lambda options: networks.cifar_resnet(depth, options.weights or Path()),
        data.cifar10,
        ("cifar", "weights"),
    )


def _crepe(capacity: str) -> Task:
    return Task(
        lambda options: networks.Crepe(capacity).eval(),
        data.pitches,
        ("sounds",),
        PITCHES,
        {"loss": bernoulli},
    )


TASKS = {
    **{f"efficientnet-lite{size}": _lite(size, pixels) for size, pixels in ((0, 224), (1, 240), (2, 260))},
    **{f"resnet{depth}": _resnet(depth) for depth in (20, 32, 44, 56)},
    **{name: _crepe(capacity) for name, capacity in (("crepe", "full"), ("crepe-tiny", "tiny"))},
}


def run_row(name: str, variant: str, options: Options) -> Row:
    """The figures of one network after one way to replace BatchNorm.

    Seconds are those that a processor took for the replacement, a mean over the folds; the test is not in
    them.
    """
    task, make = TASKS[name], VARIANTS[variant]
    network, splits = task.load(options), task.splits(options)
    outputs, seconds = [], []
    replaced = network
    for split in splits:
        if make.needs_data or not seconds:
            start = time.process_time()
            samples = split.recovery[: len(split.recovery) if make.needs_data else 1]
            replaced = make(network, samples, task.distillation).eval()
            seconds.append(time.process_time() - start)
        outputs.append(outputs_of(replaced, split.test, options.contrast))
    actual, labels = torch.cat(outputs), torch.cat([split.labels for split in splits])
    reference = _reference(name, options)
    right = task.figures.right(actual, labels).double().mean()
    same = task.figures.same(actual, reference).double().mean()
    return {
        "network": name, "variant": variant, "settings": settings(name, options), "samples": len(labels),
        "recovery": max(len(split.recovery) for split in splits) if make.needs_data else 0,
        "accuracy": 100 * float(right), "same": 100 * float(same),
        "divergence": task.figures.divergence(actual, reference),
        "seconds": round(sum(seconds) / len(seconds), 1),
    }  # fmt: skip


@functools.cache
def _reference(name: str, options: Options) -> Tensor:
    """The outputs with BatchNorm."""
    network = TASKS[name].load(options)
    splits = TASKS[name].splits(options)
    return torch.cat([outputs_of(network, split.test, options.contrast) for split in splits])


@torch.no_grad()
def outputs_of(network: nn.Module, inputs: Inputs, contrast: float = 1.0) -> Tensor:
    """[N, K], in batches, of the inputs times `contrast`."""
    outputs = []
    for start in range(0, len(inputs), BATCH):
        batch = inputs[start : start + BATCH] * contrast
        layout = torch.channels_last if batch.ndim == 4 else torch.contiguous_format
        outputs.append(network(batch.to(memory_format=layout)))  # a third less time
    return torch.cat(outputs)


def settings(name: str, options: Options) -> Row:
    """What a finished row of a network must have in common with one that is asked for, as JSON has it."""
    needed = (*TASKS[name].needs, "recover", "folds", "limit", "seed", "contrast")
    stored: Row = json.loads(json.dumps({need: getattr(options, need) for need in needed}, default=str))
    return stored
