"""What is left of trained BatchNorm networks after each way to replace BatchNorm, and with static statistics.

    python -m benchmarks.warm_start --json warm_start.json

The networks and their data are those of `benchmarks.trained`, which trains them if they are not in the cache.
Every replacement starts from the same trained network, for LayerNorm (one group) and 4, 8 and 32 groups; a
layer whose channels 32 does not divide gets the greatest common divisor. Samples for calibration and
distillation are the first of the training set, without labels; all figures are on test data. A run that was
stopped goes on where it was: finished rows are read back from the JSON file.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

import pn_compiler
from benchmarks import swaps, tasks, trained
from benchmarks.ensemble import MOMENTUM
from benchmarks.tasks import Row
from pn_compiler.base.errors import ConfigError, PnCompilerError

GROUPS = (1, 4, 8, 32)
CALIBRATION = (64, 256, 1024)  # samples
DISTILLATION = 4096  # samples, of which distill holds out a part
SEGMENTATION = ((64, 256), 2560)  # the two of a network that segments: more change nothing but the time
STATIC = 1024  # samples
RECOVERY = 600  # steps that distill a static network towards the one that it was made of
BATCH = 64  # samples in each batch of these
FINE_TUNED = (1, 8)  # groups: it takes longest
FINE_TUNING_RATE = 0.01  # on validation data like 0.003 for one group, better for 32; 0.03 loses 5 points
Networks = dict[str, nn.Module]  # by the title of their score
Task = tuple[str, str, int]  # network, method, groups: arguments of `run_row`


def batch_norm(name: str, groups: int) -> Networks:
    return {"BatchNorm": trained.load_network(name)}


def plain(name: str, groups: int) -> Networks:
    """What opacus does, and the same with weight and bias of the BatchNorm, which opacus does not keep."""
    network = trained.load_network(name)
    options = {} if groups == 32 else {"num_groups": groups}
    return {"opacus": swaps.opacus(network, **options), "GroupNorm": swaps.group_norm(network, **options)}


def running_statistics(name: str, groups: int) -> Networks:
    return {"running statistics": _converted(name, groups)}


def calibrated(name: str, groups: int) -> Networks:
    return {f"calibrated, {size}": _calibrated(name, groups, size) for size in _sizes(name)[0]}


def distilled(name: str, groups: int) -> Networks:
    start, teacher = _converted(name, groups), trained.load_network(name)
    logits = "all" if trained.RECIPES[name].segments else "auto"
    network, _ = pn_compiler.distill(start, teacher, _samples(name, _sizes(name)[1]), logits=logits)
    return {"distilled": network}


def fine_tuned(name: str, groups: int) -> Networks:
    """One epoch with labels, from the running statistics; then its statistics made constants."""
    network, recipe = _converted(name, groups), trained.RECIPES[name]
    trained.fit(
        network, trained.load_data(name)["train"], epochs=1, batch_size=recipe.batch_size,
        rate=FINE_TUNING_RATE, weight_decay=recipe.weight_decay, title=f"fine-tuning {name}",
    )  # fmt: skip
    return {"fine-tuned": network, "fine-tuned, static": _static(name, network)}


def from_scratch(name: str, groups: int) -> Networks:
    network = trained.load_network(name)
    static = _static(name, network)
    again, _ = pn_compiler.distill(
        static.requires_grad_(), network, _samples(name, DISTILLATION), steps=RECOVERY
    )
    return {"instance statistics": network, "static statistics": static, "static, distilled": again}


METHODS: dict[str, Callable[[str, int], Networks]] = {
    method.__name__.replace("_", "-"): method
    for method in (fine_tuned, distilled, calibrated, running_statistics, plain, batch_norm, from_scratch)
}
WARM = {
    "BatchNorm": "BatchNorm",
    "opacus": "opacus' replacement",
    "GroupNorm": "same, weight and bias kept",
    "running statistics": "running statistics",
    **{f"calibrated, {size}": f"calibrated, {size} samples" for size in CALIBRATION},
    "distilled": "distilled",
    "fine-tuned": "fine-tuned one epoch",
    "fine-tuned, static": "the same, static",
}  # title of a score -> head of its column
SCRATCH = {title: title for title in ("instance statistics", "static statistics", "static, distilled")}


def _converted(name: str, groups: int) -> nn.Module:
    network = trained.load_network(name)
    example = _samples(name, BATCH)[0]
    return pn_compiler.transform(network, example, num_groups=groups, warm_start="running_stats")


def _calibrated(name: str, groups: int, size: int) -> nn.Module:
    network, samples = trained.load_network(name), _samples(name, size)
    return pn_compiler.transform(
        network, samples[0], num_groups=groups, warm_start="calibrate", calibration=samples
    )


def _static(name: str, network: nn.Module) -> nn.Module:
    frozen: nn.Module
    frozen, _ = pn_compiler.freeze_statistics(network, _samples(name, STATIC), budget=None)
    return frozen


def _sizes(name: str) -> tuple[tuple[int, ...], int]:
    """How many samples it is calibrated, and distilled, with."""
    return SEGMENTATION if trained.RECIPES[name].segments else (CALIBRATION, DISTILLATION)


def _samples(name: str, size: int) -> Sequence[Tensor]:
    """The first `size` images of the training set, in batches."""
    images, _ = trained.load_data(name)["train"]
    return images[:size].split(BATCH)


def run_row(name: str, method: str, groups: int) -> Row:
    """Test scores of the networks that `method` makes of the network `name`, by title."""
    start = time.process_time()
    test = trained.load_data(name)["test"]
    networks = METHODS[method](name, groups)
    scores = {title: trained.score(network.eval(), test) for title, network in networks.items()}
    row: Row = {"network": name, "method": method, "groups": groups, "settings": settings(name)}
    return row | {"scores": scores, "seconds": round(time.process_time() - start, 1)}


def settings(name: str) -> Row:
    """What a finished row must have in common with one that is asked for, as JSON has it."""
    recipe = trained.RECIPES[name]
    values = {
        "recipe": dataclasses.asdict(recipe) | {"build": recipe.build.__name__},
        "samples": [*_sizes(name), STATIC, RECOVERY, BATCH],
        "fine-tuning": FINE_TUNING_RATE,
    }
    stored: Row = json.loads(json.dumps(values))
    return stored


def chosen_tasks(names: Sequence[str], methods: Sequence[str], groups: Sequence[int]) -> list[Task]:
    """All that is asked for; where the groups do not matter, or belong to the network, there is one row."""
    found = []
    for method, name in itertools.product(methods, names):
        own = trained.RECIPES[name].num_groups
        if (own is not None) != (method == "from-scratch"):
            continue
        given = {"batch-norm": (1,), "from-scratch": (own,)}.get(method, groups)
        if method == "fine-tuned":
            given = [number for number in groups if number in FINE_TUNED]
        found += [(name, method, number) for number in given]
    return found


def table(rows: list[Row], titles: dict[str, str]) -> str:
    """Markdown: a line for each network and number of groups, a column for each of `titles`."""
    lines = ["| " + " | ".join(["network", "groups", *titles.values()]) + " |"]
    lines.append("| --- " * (2 + len(titles)) + "|")
    rows = [row for row in rows if set(row["scores"]) & set(titles)]
    for name in trained.RECIPES:
        own = [row for row in rows if row["network"] == name]
        for groups in sorted({row["groups"] for row in own}):
            shown = [row for row in own if row["groups"] == groups or row["method"] == "batch-norm"]
            scores = {title: score for row in shown for title, score in row["scores"].items()}
            cells = [f"{scores[title]:.1f}" if title in scores else "" for title in titles]
            lines.append("| " + " | ".join([name, str(groups), *cells]) + " |")
    return "\n".join(lines)


def caption(rows: list[Row]) -> str:
    """What the tables were measured with."""
    recipes = [trained.RECIPES[name] for name in dict.fromkeys(row["network"] for row in rows)]
    data = dict.fromkeys(f"{r.metric} in % on {r.test} samples, trained on {r.train}" for r in recipes)
    training = dict.fromkeys(
        f"{r.epochs} epochs in batches of {r.batch_size} at learning rates up to {r.rate:g}, "
        f"weight decay {r.weight_decay:g}"
        for r in recipes
    )
    return (
        f"{'; '.join(data)}. SGD with momentum {MOMENTUM}: {'; '.join(training)}. opacus' replacement: "
        "ModuleValidator.fix, GroupNorm with weight 1 and bias 0, its own rule for 32 groups; the next "
        "column has the BatchNorm's weight and bias. Distilled: "
        f"from the running statistics, on {DISTILLATION} samples, {SEGMENTATION[1]} for mean IoU. "
        "Fine-tuned: one epoch with labels, from the running statistics, at learning rates up to "
        f"{FINE_TUNING_RATE:g}. Static: all normalizers frozen, with {STATIC} samples; distilled: {RECOVERY} "
        f"steps on {DISTILLATION} samples towards the network as it was. "
        f"{sum(row['seconds'] for row in rows):.0f} processor seconds."
    )


def _names(given: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    """The `given` names, or all that are `known`."""
    unknown = set(given or []) - set(known)
    if unknown:
        raise ConfigError(f"unknown: {sorted(unknown)}; expected some of {list(known)}")
    return given or known


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where rows are kept; those that it has are not run again")
    parser.add_argument("--networks", nargs="+", metavar="NAME", help=f"of {', '.join(trained.RECIPES)}")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--groups", nargs="+", type=int, metavar="N", default=GROUPS)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    names = _names(arguments.networks, list(trained.RECIPES))
    methods = _names(arguments.methods, list(METHODS))
    rows = tasks.read(arguments.json, "network", "method", "groups", "settings", "scores")
    asked = [(*task, settings(task[0])) for task in chosen_tasks(names, methods, arguments.groups)]
    done = [(row["network"], row["method"], row["groups"], row["settings"]) for row in rows]
    missing = [task[:3] for task in asked if task not in done]
    for name in {name for name, _, _ in missing}:
        trained.load_data(name)  # rendered once, before there are several processes
    untrained = sorted({name for name, _, _ in missing}, key=list(trained.RECIPES).index)
    list(tasks.run(trained.prepare, {(name,): 1 for name in untrained}, arguments.jobs))
    tasks.run_stored(run_row, dict.fromkeys(missing, 1), arguments.jobs, rows, arguments.json)
    found = [r for r in rows if (r["network"], r["method"], r["groups"], r["settings"]) in asked]
    print(f"{table(found, WARM)}\n\n{table(found, SCRATCH)}\n\n{caption(found)}\n")
    print(tasks.closing_line(start, arguments.jobs))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PnCompilerError as error:
        sys.exit(f"error: {error}")
