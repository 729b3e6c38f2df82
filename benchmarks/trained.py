"""Trained networks to convert, with their data; each is trained once and kept in the user's cache.

    python -m benchmarks.trained resnet20 unet

Three BatchNorm networks classify `benchmarks.glyphs`, a fourth segments `benchmarks.scenes`; two converted
ResNets train from scratch, without BatchNorm. All have test fonts that they are not trained on.
"""

import argparse
import dataclasses
import functools
import inspect
import multiprocessing
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import pn_compiler
from benchmarks import ensemble, glyphs, networks, scenes
from benchmarks.cache import cached
from pn_compiler.base.errors import ConfigError

Pair = tuple[Tensor, Tensor]  # images [N, 1, H, W], and classes [N] or [N, H, W]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a network of `RECIPES` is made. `num_groups` says that it is converted before it is trained."""

    build: Callable[[int], nn.Module] = networks.resnet20
    segments: bool = False
    num_groups: int | None = None
    train: int = 40960  # samples
    validation: int = 2048
    test: int = 4096
    epochs: int = 8
    batch_size: int = 128
    rate: float = 0.1  # the largest learning rate: SGD, momentum, a rise and a cosine
    weight_decay: float = 5e-4

    @property
    def metric(self) -> str:
        return "mean IoU" if self.segments else "accuracy"


RECIPES = {
    "resnet20": Recipe(),
    "mobilenet": Recipe(build=networks.mobilenet),
    "efficientnet": Recipe(build=networks.efficientnet),
    "unet": Recipe(build=networks.UNet, segments=True, batch_size=32, train=8192, validation=1024, test=2048),
    "resnet20 LN+PN": Recipe(num_groups=1),
    "resnet20 GN8+PN": Recipe(num_groups=8),
}


def load_network(name: str) -> nn.Module:
    """The network `name` of `RECIPES`, trained, in eval mode; it is trained now if it is not in the cache.

    Raises:
        ConfigError: an unknown name.
    """
    recipe = _recipe(name)
    network = untrained(recipe)
    data = (glyphs, scenes) if recipe.segments else (glyphs,)
    parts = (networks, untrained, _load_parts, fit, ensemble.schedule, *data)
    sources = [inspect.getsource(part) for part in parts]
    settings = {**dataclasses.asdict(recipe), "build": recipe.build.__name__}
    state = cached("networks", name, f"{settings}{sources}", lambda: _trained_state(name, network))
    network.load_state_dict(state)
    return network.eval()


def prepare(name: str) -> None:
    """Trains the network `name` if it is not in the cache."""
    load_network(name)


def untrained(recipe: Recipe) -> nn.Module:
    """A network of `recipe` before training, the same in each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = recipe.build(_classes(recipe))
    if recipe.num_groups is not None:
        network = pn_compiler.transform(network, warm_start="none", num_groups=recipe.num_groups)
    return network.to(memory_format=torch.channels_last)


def _trained_state(name: str, network: nn.Module) -> dict[str, Tensor]:
    recipe = _recipe(name)
    fit(
        network, load_data(name)["train"], epochs=recipe.epochs, batch_size=recipe.batch_size,
        rate=recipe.rate, weight_decay=recipe.weight_decay, title=f"training {name}",
    )  # fmt: skip
    return network.state_dict()


def load_data(name: str) -> dict[str, Pair]:
    """Images [N, 1, H, W], mean 0 and deviation 1 over the training set, and classes, by part.

    The parts are "train", "validation" (of the training fonts) and "test". Classes are [N], or [N, H, W] for
    a network that segments.
    """
    recipe = _recipe(name)
    return _load_parts(recipe.segments, recipe.train, recipe.validation, recipe.test)


@functools.cache
def _load_parts(segments: bool, *sizes: int) -> dict[str, Pair]:
    source = scenes if segments else glyphs
    train, validation, test = sizes
    images, labels = source.load("train", train + validation)
    test_images, test_labels = source.load("test", test)
    mean, deviation = images[:train].mean(), images[:train].std()
    parts = {
        "train": (images[:train], labels[:train]),
        "validation": (images[train:], labels[train:]),
        "test": (test_images, test_labels),
    }
    return {part: ((x - mean) / deviation, y) for part, (x, y) in parts.items()}


def fit(
    network: nn.Module,
    data: Pair,
    *,
    epochs: int,
    batch_size: int,
    rate: float,
    weight_decay: float,
    title: str,
) -> None:
    """SGD on cross entropy, in an order that is the same in each call; the network is in eval mode then."""
    images, labels = data
    steps = len(images) // batch_size
    groups = pn_compiler.param_groups(network, weight_decay)
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=ensemble.MOMENTUM)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: ensemble.schedule(min(step, epochs * steps - 1), epochs * steps)
    )
    generator = torch.Generator().manual_seed(0)
    worker = multiprocessing.parent_process() is not None  # whose bar would be in the way of another's
    network.train()
    with tqdm(total=epochs * steps, disable=worker or None, leave=False, desc=title, unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for rows in order[: steps * batch_size].split(batch_size):
                optimizer.zero_grad()
                loss = F.cross_entropy(network(images[rows]), labels[rows])
                loss.backward()
                optimizer.step()
                scheduler.step()
                bar.update()
    network.eval()


@torch.no_grad()
def score(network: nn.Module, data: Pair) -> float:
    """Accuracy in percent; for masks the mean intersection over union of the classes."""
    counts: Tensor | float = 0.0  # [true class, predicted class]
    for images, labels in zip(*(part.split(256) for part in data), strict=True):
        logits = network(images)
        classes = logits.shape[1]
        pairs = labels.flatten() * classes + logits.argmax(1).flatten()
        counts = counts + pairs.bincount(minlength=classes**2).reshape(classes, classes).double()
    right = counts.diagonal()
    if data[1].dim() == 1:
        return 100 * float(right.sum() / counts.sum())
    return 100 * float((right / (counts.sum(0) + counts.sum(1) - right)).mean())


def _classes(recipe: Recipe) -> int:
    return len(scenes.CLASSES if recipe.segments else glyphs.CLASSES)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ConfigError(f"no network {name!r}: expected one of {list(RECIPES)}")
    return RECIPES[name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    for name in parser.parse_args().names or RECIPES:
        start = time.process_time()
        network, data = load_network(name), load_data(name)
        seconds = time.process_time() - start
        figures = ", ".join(f"{part} {score(network, data[part]):.2f}" for part in ("validation", "test"))
        print(f"{name}: {_recipe(name).metric} in %: {figures}; {seconds:.0f} processor seconds", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
