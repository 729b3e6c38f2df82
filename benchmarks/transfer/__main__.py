"""Accuracy after fine-tuning a trained network with small batches, by way to replace BatchNorm.

    python -m benchmarks.transfer --cifar CIFAR --json transfer.json
    python -m benchmarks.transfer --cifar CIFAR --json transfer.json --private

EfficientNet-Lite, trained on ImageNet, gets a new head of ten classes, which is fitted to its features
first, and is trained in one pass over a few images: of CIFAR-10 (CIFAR holds train/ and test/) and
scikit-learn's digits, which need no files. All methods of a seed see the same images in the same order. The
learning rate is swept for each method and batch size, and chosen by accuracy on other training images;
shown is that on test images. With --private, opacus trains at epsilon 8, and no head is fitted. A run that
was stopped goes on where it was: finished trainings are read back from the JSON file.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks import tasks
from benchmarks.ensemble import MOMENTUM
from benchmarks.tasks import Row
from benchmarks.transfer import data, private, tables
from benchmarks.transfer.options import BATCH_SIZES, PRIVATE_BATCH_SIZES, RATED_BATCH, RATES, Options, Run
from benchmarks.transfer.starts import BACKBONES, methods
from benchmarks.transfer.tuning import CLIP, WEIGHT_DECAY, run_row, settings
from pn_compiler.base.errors import ConfigError, PnCompilerError
from pn_compiler.base.option_checks import check_number


def chosen(arguments: argparse.Namespace, options: Options) -> list[Run]:
    """All runs that are asked for, those of a method together: they share what is converted.

    Raises:
        ConfigError: a name is unknown, or a number makes no sense.
    """
    known = methods(options)
    _check_known(arguments.methods or (), known)
    _check_known(arguments.targets or (), data.TARGETS)
    targets = arguments.targets or list(data.TARGETS)
    lacking = [name for name in targets if _lacks(name, options)]
    if arguments.targets and lacking:
        raise ConfigError(f"{lacking[0]} needs --{data.TARGETS[lacking[0]].needs}")
    sizes = sorted(arguments.batch_sizes or (PRIVATE_BATCH_SIZES if options.private else BATCH_SIZES))
    rates = sorted(arguments.rates)
    for size in sizes:
        check_number("batch_sizes", size, "1 or more", 1, whole=True)
    for rate in rates:
        check_number("rates", rate, "a number above 0", sys.float_info.min)
    names = [name for name in known if name in (arguments.methods or known)]
    targets = [name for name in targets if name not in lacking]
    cells = itertools.product(targets, names, sizes, rates, range(options.seeds))
    return [Run(*cell) for cell in cells]


def _check_known(names: Collection[str], known: Collection[str]) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise ConfigError(f"unknown: {unknown}; expected some of {list(known)}")


def _lacks(target: str, options: Options) -> bool:
    need = data.TARGETS[target].needs
    return need is not None and getattr(options, need) is None


def report(runs: Sequence[Run], rows: Sequence[Row], options: Options) -> str:
    """Both tables of each target, and how they were measured."""
    asked = [dataclasses.asdict(run) for run in runs]
    parts = []
    for target in dict.fromkeys(run.target for run in runs):
        own = [row for row in rows if row["run"]["target"] == target and row["run"] in asked]
        names = list(dict.fromkeys(run.method for run in runs))
        sizes, rates = ({getattr(run, name) for run in runs} for name in ("batch_size", "rate"))
        parts += [
            caption(target, own, options),
            tables.at_best_rate(own, names, sorted(sizes)),
            "By learning rate:",
            tables.by_rate(own, names, sorted(sizes), sorted(rates)),
        ]
    return "\n\n".join(parts)


def caption(target: str, rows: Sequence[Row], options: Options) -> str:
    """The settings that the tables of a target were measured with."""
    training = (
        f"the head fitted first, then one pass, SGD with momentum {MOMENTUM}, weight decay "
        f"{WEIGHT_DECAY:g}, cosine schedule, gradients clipped at {CLIP:g}"
    )
    if options.private:
        training = (
            f"{private.EPOCHS} epochs of SGD with momentum {MOMENTUM} on normalizers and head, epsilon "
            f"{private.EPSILON:g}, delta {private.DELTA:g}, gradients clipped at {private.CLIP:g}"
        )
    distilled = "converted networks distilled on the training images first; " if options.distilled else ""
    return (
        f"{target}, {options.network}: test accuracy in %, mean ± standard deviation over {options.seeds} "
        f"seeds. {data.training_images(target, options)} training images of {options.pixels} pixels, "
        f"{options.validation} to choose the rate with, {options.test} to test with at most; "
        f"{distilled}{training}. In parentheses the learning rate, given for a batch of {RATED_BATCH} and in "
        "proportion to the batch size. ↓ ↑: the smallest, the largest rate was best. †: one run diverged and "
        f"counts as chance. {sum(row['seconds'] for row in rows):.0f} processor seconds."
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--cifar", type=Path, metavar="DIR", help="CIFAR-10: train/ and test/")
    add("--targets", nargs="+", metavar="NAME", help=f"of {', '.join(data.TARGETS)}")
    add("--methods", nargs="+", metavar="NAME", help=f"of {', '.join(methods(Options()))}")
    add("--network", choices=list(BACKBONES), default=Options.network)
    add("--batch-sizes", nargs="+", type=int, metavar="N", help="1 2 8; with --private 64")
    add("--rates", nargs="+", type=float, default=RATES, metavar="LR", help="for a batch of 2")
    add("--seeds", type=int, default=Options.seeds, metavar="N", help="runs of each kind (3)")
    add("--pixels", type=int, default=Options.pixels, metavar="N", help="of a side (96)")
    images = ", ".join(f"{target.train} of {name}" for name, target in data.TARGETS.items())
    add("--train", type=int, metavar="N", help=f"training images ({images})")
    add("--validation", type=int, default=Options.validation, metavar="N", help="other ones (500)")
    add("--test", type=int, default=Options.test, metavar="N", help="the most test images (1000)")
    add("--distilled", action="store_true", help="distil converted networks first, without labels")
    add("--private", action="store_true", help="train with opacus")
    add("--jobs", type=int, default=2, help="processes of one thread each")
    add("--json", type=Path, help="where trainings are kept; those that it has are not run again")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    begin = time.perf_counter()
    options = Options(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)})
    runs = chosen(arguments, options)
    rows = tasks.read(arguments.json, "run", "settings")
    done = [(row["run"], row["settings"]) for row in rows]
    missing = [run for run in runs if (dataclasses.asdict(run), settings(run, options)) not in done]
    for target in dict.fromkeys(run.target for run in missing):
        data.load(target, options)  # what is wrong with the images is said before anything is trained
    costs = {(run, options): data.training_images(run.target, options) / run.batch_size for run in missing}
    tasks.run_stored(run_row, costs, arguments.jobs, rows, arguments.json)
    asked = [(dataclasses.asdict(run), settings(run, options)) for run in runs]
    print(report(runs, [row for row in rows if (row["run"], row["settings"]) in asked], options))
    print(f"\n{tasks.closing_line(begin, arguments.jobs)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PnCompilerError as error:
        sys.exit(f"error: {error}")
