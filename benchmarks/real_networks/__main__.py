"""Public trained networks on real data, after each way to replace BatchNorm.

    python -m benchmarks.real_networks --images IMAGENET --cifar CIFAR --weights WEIGHTS --sounds

IMAGENET holds a folder for each class, or for some, called by its number (0007) or its synset (n01514668):
EfficientNet-Lite0, 1 and 2. CIFAR holds train/ and test/ with CIFAR-10 as image files, WEIGHTS the files
cifar10-resnet20.safetensors to 56. Sounds are synthesised: CREPE. Without data, all images are tested on; a
network that was recovered is tested on images that it has not seen, see `benchmarks.real_networks.data`. A
run that was stopped goes on where it was: finished rows are read back from the JSON file.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tasks
from benchmarks.real_networks.data import Options
from benchmarks.real_networks.measure import TASKS, run_row, settings
from benchmarks.real_networks.variants import VARIANTS
from benchmarks.tasks import Row
from pn_compiler.base.errors import ConfigError, PnCompilerError


def overview(rows: Sequence[Row]) -> str:
    """Markdown: a line for each network, accuracy and share of the same class for each variant."""
    variants = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    lines = [" | ".join(["| network", *variants]) + " |", "| --- " * (1 + len(variants)) + "|"]
    for network in TASKS:
        own = {row["variant"]: row for row in rows if row["network"] == network}
        cells = [_short(own[variant]) if variant in own else "" for variant in variants]
        lines += ["| " + " | ".join([network, *cells]) + " |"] if own else []
    return "\n".join(lines)


def _short(row: Row) -> str:
    same = "" if row["variant"] == "BatchNorm" else f" / {row['same']:.1f}"
    return f"{row['accuracy']:.1f}{same}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each network and variant, with all figures."""
    head = (
        "network",
        "variant",
        "accuracy, %",
        "lost",
        "same class, %",
        "divergence",
        "seconds",
        "recovered with",
    )
    lines = [" | ".join(["| " + head[0], *head[1:]]) + " |", "| --- " * len(head) + "|"]
    for network in TASKS:
        own = {row["variant"]: row for row in rows if row["network"] == network}
        before = own.get("BatchNorm", {}).get("accuracy")
        for variant in (variant for variant in VARIANTS if variant in own):
            row = own[variant]
            lost = "" if before is None else f"{before - row['accuracy']:.1f}"
            cells = (network, variant, f"{row['accuracy']:.1f}", lost, f"{row['same']:.1f}")
            cells += (f"{row['divergence']:.3f}", f"{row['seconds']:.1f}", str(row["recovery"] or ""))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chosen(arguments: argparse.Namespace, options: Options) -> list[tuple[str, str, Options]]:
    """All rows that are asked for. Raises ConfigError if there is nothing, or a name is unknown."""
    for given, known in ((arguments.networks, TASKS), (arguments.variants, VARIANTS)):
        unknown = set(given or ()) - known.keys()
        if unknown:
            raise ConfigError(f"unknown: {sorted(unknown)}; expected some of {list(known)}")
    names = []
    for name in arguments.networks or TASKS:
        lacking = [f"--{need}" for need in TASKS[name].needs if not getattr(options, need)]
        if not lacking:
            names.append(name)
        elif arguments.networks:
            raise ConfigError(f"{name} needs {' and '.join(lacking)}")
    if not names:
        raise ConfigError("no network has its data: give --images DIR, --cifar and --weights, or --sounds")
    return [(name, variant, options) for name in names for variant in arguments.variants or VARIANTS]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_networks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="DIR", help="an ImageNet folder")
    parser.add_argument("--cifar", type=Path, metavar="DIR", help="CIFAR-10: train/ and test/")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="cifar10-resnet20.safetensors, ...")
    parser.add_argument("--sounds", type=int, nargs="?", const=500, metavar="N", help="how many (500)")
    parser.add_argument("--recover", type=int, default=Options.recover, metavar="N", help="samples (400)")
    parser.add_argument("--folds", type=int, default=Options.folds, metavar="N", help="of the images (5)")
    parser.add_argument("--limit", type=int, metavar="N", help="the most images to test on")
    parser.add_argument("--seed", type=int, default=Options.seed, help="of orders and sounds")
    parser.add_argument("--contrast", type=float, default=Options.contrast, help="of what is tested on (1)")
    parser.add_argument("--networks", nargs="+", metavar="NAME", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--json", type=Path, help="where rows are kept; those that it has are not run again")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    start = time.perf_counter()
    fields = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)}
    options = Options(**fields)
    asked = chosen(arguments, options)
    rows = tasks.read(arguments.json, "network", "variant", "settings")
    done = [(row["network"], row["variant"], row["settings"]) for row in rows]
    missing = [row for row in asked if (row[0], row[1], settings(row[0], options)) not in done]
    tasks.run_stored(run_row, dict.fromkeys(missing, 1), arguments.jobs, rows, arguments.json)
    wanted = [(name, variant, settings(name, options)) for name, variant, _ in asked]
    found = [row for row in rows if (row["network"], row["variant"], row["settings"]) in wanted]
    print(f"accuracy / same class as with BatchNorm, %\n\n{overview(found)}\n\n{table(found)}\n")
    print(tasks.closing_line(start, arguments.jobs))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PnCompilerError as error:
        sys.exit(f"error: {error}")
