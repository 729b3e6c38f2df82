"""Test accuracy by normalizer and batch size, on digits and on rendered characters.

    python -m benchmarks.small_batch --dataset all --json small_batch.json

Every network is made by `pn_compiler.transform` from the same untrained BatchNorm network and trains from
scratch on the same number of samples. The learning rate is swept for each variant and batch size on the same
grid, and chosen by accuracy on held-out training data, mean over the seeds; the table shows the test accuracy
at the chosen rate.

All seeds and learning rates of a cell train at once, as one network whose convolutions and normalizers have
one group (or a multiple) for each member. Members share no value, and each has its own weights, order of
samples and learning rate; a small batch costs mostly the calls of operators, which they share. A run that was
stopped goes on where it was: finished cells are read back from the JSON file.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import pn_compiler
from benchmarks import glyphs, tasks
from benchmarks.ensemble import MOMENTUM, Ensemble, accuracy, train
from benchmarks.tasks import Row
from pn_compiler.base.errors import ConfigError, PnCompilerError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings that all cells of one table share."""

    dataset: str
    widths: tuple[int, ...]  # channels of each stage
    blocks: int  # residual blocks in each stage
    stem_stride: int
    classes: int
    train: int  # samples of an epoch, a multiple of every batch size
    validation: int
    test: int
    epochs: int
    seeds: int
    rates: tuple[float, ...]  # learning rates at batch size 1; see `learning_rate`
    batch_sizes: tuple[int, ...]
    groups: tuple[int, ...]  # of the GroupNorm variants, in every layer
    paddings: tuple[str, ...]  # values of proxy_padding
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        uneven = [size for size in self.batch_sizes if self.train % size]
        if uneven or self.train < 1:
            raise ConfigError(f"{self.train} training samples are no multiple of the batch sizes {uneven}")

    def variants(self) -> dict[str, "Variant"]:
        """The rows of the table."""
        found = {"BN": Variant(groups=None), "IN": Variant(groups=0)}
        for name, groups in {"LN": 1, **{f"GN{g}": g for g in self.groups}}.items():
            found[name] = Variant(groups=groups)
            for padding in self.paddings:
                title = f"{name}+PN" if padding == "activation" else f"{name}+PN {padding} padding"
                found[title] = Variant(groups=groups, padding=padding)
        return found

    def learning_rate(self, rate: float, batch_size: int) -> float:
        """The linear scaling rule up to a batch of 8, where noise bounds the rate; its root beyond."""
        return rate * min(batch_size, 8) * math.sqrt(max(batch_size, 8) / 8)


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """A normalizer: groups None is BatchNorm, 0 InstanceNorm; padding None is no proxy normalization."""

    groups: int | None
    padding: str | None = None


# Meant for half an hour each on 2 cores. For that the glyphs do with half the width of the usual ResNet-20,
# a stride of 2 at first, one pass over the samples, no batch size 1, one group width and one padding.
RECIPES = {
    "digits": Recipe(
        dataset="digits", widths=(8, 16, 32), blocks=2, stem_stride=1, classes=10,
        train=1024, validation=233, test=540, epochs=8, seeds=5, rates=(1e-3, 2e-3, 4e-3, 8e-3, 16e-3),
        batch_sizes=(1, 2, 8, 32, 128), groups=(2, 4), paddings=("activation", "output"),
    ),
    "glyphs": Recipe(
        dataset="glyphs", widths=(8, 16, 32), blocks=3, stem_stride=2, classes=len(glyphs.CLASSES),
        train=21504, validation=1024, test=4096, epochs=1, seeds=3, rates=(1e-3, 3e-3, 9e-3, 27e-3),
        batch_sizes=(2, 8, 32, 128), groups=(4,), paddings=("activation",),
    ),
}  # fmt: skip


def build(recipe: Recipe, variant: Variant, seeds: Sequence[int]) -> nn.Module:
    """An ensemble of one variant whose member i starts from ``seeds[i]``, whatever the others are."""
    network: nn.Module = Ensemble(
        len(seeds), widths=recipe.widths, blocks=recipe.blocks, stem_stride=recipe.stem_stride,
        classes=recipe.classes,
    )  # fmt: skip
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            for part, generator in zip(module.weight.chunk(len(seeds)), generators, strict=True):
                nn.init.kaiming_normal_(part, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if variant.groups is None:
        return network
    padding = {"proxy_padding": variant.padding} if variant.padding else {"proxy": False}
    groups = {"num_groups": len(seeds) * variant.groups} if variant.groups else {"norm": "instance"}
    return pn_compiler.transform(network, warm_start="none", strict=True, **padding, **groups)


@functools.cache
def load(recipe: Recipe, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Images [N, H, W], mean 0 and deviation 1 over the training set, and labels [N], by part."""
    sizes = (recipe.train, recipe.validation, recipe.test)
    if recipe.dataset == "digits":
        images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
        images = images.float().reshape(-1, 8, 8)
        rest, test = train_test_split(
            np.arange(len(labels)), test_size=recipe.test, stratify=labels, random_state=0
        )
        first, held_out = train_test_split(
            rest, train_size=recipe.train, test_size=recipe.validation, stratify=labels[rest], random_state=0
        )
        parts = [(images[rows], labels[rows]) for rows in (first, held_out, test)]
    else:
        images, labels = glyphs.load("train", recipe.train + recipe.validation)
        pairs = zip(images.squeeze(1).split(sizes[:2]), labels.split(sizes[:2]), strict=True)
        test_images, test_labels = glyphs.load("test", recipe.test)
        parts = [*pairs, (test_images.squeeze(1), test_labels)]
    mean, deviation = parts[0][0].mean(), parts[0][0].std()
    names = ("train", "validation", "test")
    return {
        name: (((x - mean) / deviation).to(device), y.to(device))
        for name, (x, y) in zip(names, parts, strict=True)
    }


def run_cell(recipe: Recipe, name: str, batch_size: int, device: str) -> Row:
    """Trains all seeds and learning rates of one variant at one batch size."""
    start = time.perf_counter()
    data = load(recipe, device)
    pairs = list(itertools.product(recipe.rates, range(recipe.seeds)))
    seeds = [seed for _, seed in pairs]
    rates = [recipe.learning_rate(rate, batch_size) for rate, _ in pairs]
    network = build(recipe, recipe.variants()[name], seeds).to(device)
    train(
        network, data["train"], seeds=seeds, rates=rates, batch_size=batch_size,
        epochs=recipe.epochs, weight_decay=recipe.weight_decay,
    )  # fmt: skip
    row: Row = {"variant": name, "batch_size": batch_size, "recipe": _key(recipe)}
    for part in ("validation", "test"):  # [rates][seeds]
        found = accuracy(network, data[part], len(pairs))
        row[part] = [found[i : i + recipe.seeds] for i in range(0, len(pairs), recipe.seeds)]
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def _key(recipe: Recipe) -> Row:
    """What must be equal for a finished cell to be reused for `recipe`, as JSON stores it."""
    rows_and_columns = {"batch_sizes": None, "groups": None, "paddings": None}  # no cell depends on them
    stored: Row = json.loads(json.dumps(dataclasses.asdict(recipe) | rows_and_columns))
    return stored


def table(recipe: Recipe, rows: list[Row]) -> str:
    """Markdown: mean and standard deviation over seeds of the test accuracy at the chosen learning rate."""
    cells = {(row["variant"], row["batch_size"]): row for row in rows}
    lines = ["| " + " | ".join(["batch size", *map(str, recipe.batch_sizes)]) + " |"]
    lines.append("| --- " * (1 + len(recipe.batch_sizes)) + "|")
    for name in recipe.variants():
        if not any(variant == name for variant, _ in cells):
            continue  # not asked for
        texts = [_cell_text(cells.get((name, size))) for size in recipe.batch_sizes]
        lines.append("| " + " | ".join([name, *texts]) + " |")
    return "\n".join(lines)


def _cell_text(row: Row | None) -> str:
    if row is None:
        return ""
    means = [statistics.mean(seeds) for seeds in row["validation"]]
    best = means.index(max(means))
    edge = {0: " ↓", len(means) - 1: " ↑"}.get(best, "")
    test = row["test"][best]
    deviation = f" ± {statistics.stdev(test):.1f}" if len(test) > 1 else ""
    return f"{statistics.mean(test):.1f}{deviation}{edge}"


def caption(recipe: Recipe, rows: list[Row]) -> str:
    """The settings that the table was measured with."""
    rates = ", ".join(f"{rate:g}" for rate in recipe.rates)
    depth, widths = 2 + 2 * len(recipe.widths) * recipe.blocks, "-".join(map(str, recipe.widths))
    return (
        f"{recipe.dataset}: test accuracy in %, mean ± standard deviation over {recipe.seeds} seeds. "
        f"Pre-activation ResNet-{depth} of {widths} channels, stride {recipe.stem_stride} at first; "
        f"{recipe.train} training samples, epochs: {recipe.epochs}, SGD with momentum {MOMENTUM}, "
        f"weight decay {recipe.weight_decay:g}. Learning rates {rates} at batch size 1, in proportion to the "
        "batch size up to 8, to its root beyond; "
        f"chosen on {recipe.validation} validation samples, shown on {recipe.test} test samples. "
        "↓ ↑: the smallest, the largest rate was best. "
        f"{sum(row['seconds'] for row in rows):.0f} processor seconds."
    )


Task = tuple[Recipe, str, int, str]  # arguments of run_cell


def chosen_recipes(arguments: argparse.Namespace) -> list[Recipe]:
    names = list(RECIPES) if arguments.dataset == "all" else [arguments.dataset]
    given = {key: getattr(arguments, key) for key in ("seeds", "epochs", "train", "batch_sizes")}
    changes = {key: value for key, value in given.items() if value is not None}
    if "batch_sizes" in changes:
        changes["batch_sizes"] = tuple(sorted(changes["batch_sizes"]))
    return [dataclasses.replace(RECIPES[name], **changes) for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=(*RECIPES, "all"), default="all")
    parser.add_argument("--json", type=Path, help="where cells are kept; those that it has are not run again")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these rows, such as BN LN LN+PN")
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="N")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--train", type=int, help="training samples")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    recipes = chosen_recipes(arguments)
    rows = tasks.read(arguments.json, "recipe", "variant", "batch_size")
    done = [(row["recipe"], row["variant"], row["batch_size"]) for row in rows]
    costs: dict[Task, float] = {}  # steps
    for recipe in recipes:
        load(recipe, arguments.device)  # rendered once, before there are several processes
        unknown = set(arguments.variants or []) - set(recipe.variants())
        if unknown:
            raise ConfigError(f"no variants {sorted(unknown)}: expected some of {list(recipe.variants())}")
        names = arguments.variants or recipe.variants()
        cells = itertools.product(recipe.batch_sizes, names)  # the longest first
        missing = [(recipe, n, b, arguments.device) for b, n in cells if (_key(recipe), n, b) not in done]
        costs |= {task: recipe.epochs * recipe.train // task[2] for task in missing}
    tasks.run_stored(run_cell, costs, arguments.jobs, rows, arguments.json)
    for recipe in recipes:
        found = [row for row in rows if row["recipe"] == _key(recipe)]
        print(f"{table(recipe, found)}\n\n{caption(recipe, found)}\n")
    print(f"{time.perf_counter() - start:.0f} s with {arguments.jobs} processes, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PnCompilerError as error:
        sys.exit(f"error: {error}")
