"""One run: a network is trained in one pass over the images, and its accuracy measured."""

import dataclasses
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ensemble import MOMENTUM, schedule
from benchmarks.real_networks.measure import outputs_of
from benchmarks.tasks import Row
from benchmarks.transfer import data, private
from benchmarks.transfer.data import Part
from benchmarks.transfer.options import Options, Run
from benchmarks.transfer.probe import PENALTY, fit_head
from benchmarks.transfer.starts import BACKBONES, METHODS, start
from pn_compiler import param_groups

WEIGHT_DECAY = 1e-4
CLIP = 1.0  # the largest norm of the gradient of all parameters together
CHANCE = 100 / data.CLASSES


def fine_tune(
    network: nn.Module, images: Part, *, batch_size: int, learning_rate: float, seed: int, frozen: bool
) -> bool:
    """SGD with momentum and clipped gradients in one pass over the images, in an order of the seed.

    Args:
        network: is trained in place.
        images: to train with.
        frozen: whether BatchNorms stay in eval mode.

    Returns:
        Whether all losses were finite; it stops at the first that is not.
    """
    set_training(network, frozen=frozen)
    optimizer = torch.optim.SGD(param_groups(network, WEIGHT_DECAY), learning_rate, MOMENTUM)
    inputs, labels = images
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).split(batch_size)
    for step, rows in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, len(order))
        batch = inputs[rows].to(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(batch), labels[rows])
        if not loss.isfinite():
            return False
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
    return True


def set_training(network: nn.Module, *, frozen: bool) -> None:
    """Training mode, but for BatchNorms that are frozen: those evaluate with their running statistics."""
    network.train()
    if frozen:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def accuracy(network: nn.Module, images: Part) -> float | None:
    """Percent, or None where an output is not finite."""
    inputs, labels = images
    outputs: Tensor = outputs_of(network.eval(), inputs)
    if not outputs.isfinite().all():
        return None
    return 100 * float((outputs.argmax(1) == labels).double().mean())


def run_row(run: Run, options: Options) -> Row:
    """Validation and test accuracy after one run; those of a run that diverged are what chance gives."""
    begin = time.process_time()
    parts = data.load(run.target, options)
    network = start(run.target, run.method, run.seed, options)
    finite = _train(network, parts["train"], run, options)
    found = [accuracy(network, parts[part]) if finite else None for part in ("validation", "test")]
    diverged = None in found
    validation, test = (CHANCE if diverged else value for value in found)
    return {
        "run": dataclasses.asdict(run), "settings": settings(run, options), "validation": validation,
        "test": test, "diverged": diverged, "seconds": round(time.process_time() - begin, 1),
    }  # fmt: skip


def _train(network: nn.Module, images: Part, run: Run, options: Options) -> bool:
    shared = {"batch_size": run.batch_size, "learning_rate": run.learning_rate, "seed": run.seed}
    head = BACKBONES[options.network].head
    if options.private:  # without fitting the head first: nothing may see the images but through noise
        return private.fine_tune_privately(network, head, images, **shared)
    fit_head(network, head, images)
    return fine_tune(network, images, frozen=METHODS[run.method].frozen, **shared)


def settings(run: Run, options: Options) -> Row:
    """What a finished row must have in common with one that is asked for, as JSON has it."""
    shared = dataclasses.asdict(options) | {
        "train": data.training_images(run.target, options),
        "recipe": "private" if options.private else f"clipped at {CLIP:g}, head fitted with {PENALTY:g}",
    }
    del shared["seeds"]  # nothing in a row depends on it
    for name, target in data.TARGETS.items():
        if name != run.target and target.needs:
            del shared[target.needs]
    stored: Row = json.loads(json.dumps(shared, default=str))
    return stored
