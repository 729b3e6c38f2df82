"""Latency of an ONNX file on a CPU, relative to that of the same network with BatchNorm.

    python -m benchmarks.latency --mode exact --json latency.json --plot latency.png
    python -m benchmarks.latency --mode static --models resnet50,mobilenet_v2,efficientnet_b0 --openvino
    python -m benchmarks.latency --mode exact --profile resnet50 "pn_compiler, after a warm start"
    python -m benchmarks.latency --mode exact --providers cuda,tensorrt --batches 1,8,32 --threads 4,8,16

Each mode compares several files made from one network of torchvision, or the U-Net of `benchmarks.networks`,
the first with BatchNorm folded into the convolutions. Weights and running statistics are random, which is no
matter for the time. Sessions are opened one after the other, never two at a time, for the threads of an idle
one spin. In each round every file gets a session, forwards in one round and backwards in the next; its time
is the median of its runs. A ratio is the median over all rounds of the time to that of the first file in the
same round and the same runtime.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tqdm import tqdm

from benchmarks import latency_plot, operator_profile
from benchmarks.runtimes import CRASHES, PROVIDERS, RUNTIMES, Runtime
from benchmarks.variants import MODES, RUNTIME_OF, image
from pn_compiler.base.files import write_atomically
from pn_compiler.export.tuning import WARM_UP, take_turns

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "unet")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of the output; `ratio` is to the first variant with all else equal."""

    model: str
    batch: int
    threads: int
    runtime: str
    variant: str
    milliseconds: float
    ratio: float

    def __str__(self) -> str:
        return (
            f"{self.model:<17}{self.batch:>6}{self.threads:>8}  {self.runtime:<12}{self.variant:<34}"
            f"{self.milliseconds:>8.2f}{self.ratio:>8.3f}"
        )


def measure(
    files: Mapping[str, bytes],
    images: np.ndarray[Any, Any],
    runtime: Runtime,
    *,
    threads: int,
    rounds: int,
    runs: int,
    title: str,
) -> dict[str, list[float]]:
    """Seconds of one inference, the median of a session, for each file and round."""
    openers = {
        variant: functools.partial(runtime, content, images, threads) for variant, content in files.items()
    }
    with tqdm(total=rounds * len(files), desc=title, disable=None, leave=False) as bar:
        return take_turns(openers, bar.update, rounds=rounds, runs=runs)


def rows(
    name: str,
    files: Mapping[str, bytes],
    arguments: argparse.Namespace,
    batch: int,
    threads: int,
    runtime: str,
) -> list[Row]:
    """One for each file."""
    files = {
        variant: content
        for variant, content in files.items()
        if (runtime, variant) not in CRASHES and RUNTIME_OF.get(variant, runtime) == runtime
    }
    seconds = measure(
        files, image(name, arguments.pixels, batch).numpy(), RUNTIMES[runtime], threads=threads,
        rounds=arguments.rounds, runs=arguments.runs, title=f"{name}, {threads} threads, {runtime}",
    )  # fmt: skip
    base = next(iter(seconds.values()))
    return [
        Row(
            name, batch, threads, runtime, variant, 1e3 * statistics.median(times),
            statistics.median(a / b for a, b in zip(times, base, strict=True)),
        )
        for variant, times in seconds.items()
    ]  # fmt: skip


def compare(arguments: argparse.Namespace) -> list[Row]:
    """Measures and prints everything that the arguments ask for."""
    found = []
    print(f"load average {os.getloadavg()[0]:.1f} at the start; what else runs changes ratios, too")
    print(f"{'model':<17}{'batch':>6}{'threads':>8}  {'runtime':<12}{'variant':<34}{'ms':>8}{'ratio':>8}")
    runtimes = [PROVIDERS[name][0] for name in arguments.providers]
    runtimes += ["OpenVINO"] if arguments.openvino else []
    for name, batch in itertools.product(arguments.models, arguments.batches):
        chosen = {variant: MODES[arguments.mode][variant] for variant in arguments.variants}
        bar = tqdm(chosen.items(), desc=f"{name}: files", disable=None, leave=False)
        files = {
            variant: make(name, arguments.pixels, batch)
            for variant, make in bar
            if RUNTIME_OF.get(variant) in (None, *runtimes)
        }
        for runtime, threads in itertools.product(runtimes, arguments.threads):
            measured = rows(name, files, arguments, batch, threads, runtime)
            print(*measured, sep="\n", flush=True)
            found += measured
            if arguments.json is not None:  # each time: a run may be stopped
                content = json.dumps([dataclasses.asdict(row) for row in found], indent=1)
                write_atomically(arguments.json, content.encode())
    print(
        f"{arguments.pixels} x {arguments.pixels} pixels, float32, {arguments.rounds} sessions of "
        f"{arguments.runs} runs each, load average {os.getloadavg()[0]:.1f} at the end"
    )
    return found


def profile(arguments: argparse.Namespace) -> None:
    """Prints the operator profile of one file, for each batch size."""
    name, variant = arguments.profile
    for batch in arguments.batches:
        content = MODES[arguments.mode][variant](name, arguments.pixels, batch)
        images = image(name, arguments.pixels, batch).numpy()
        nodes = operator_profile.profile(content, images, runs=arguments.runs, warm_up=WARM_UP)
        print(f"{name}, {variant}, batch {batch}, {arguments.pixels} pixels, onnxruntime, 1 thread\n")
        print(operator_profile.tables(nodes))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    warnings.simplefilter("ignore")
    if arguments.profile:
        profile(arguments)
        return 0
    found = compare(arguments)
    if arguments.plot is not None:
        latency_plot.plot([dataclasses.asdict(row) for row in found]).savefig(arguments.plot, dpi=150)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the arguments; exits with one line, before any work, if one cannot be satisfied."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=list(MODES), required=True)
    parser.add_argument("--models", type=_names, default=list(NETWORKS))
    parser.add_argument("--batches", type=_numbers, default=[1], help="batch sizes")
    parser.add_argument("--threads", type=_numbers, default=[1, 2])
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runs", type=int, default=20, help="in a session, besides some to warm up")
    parser.add_argument(
        "--variants", type=_titles, help="of the mode, with semicolons between them; BatchNorm is always one"
    )
    parser.add_argument(
        "--providers", type=_names, default=["cpu"], help=f"of onnxruntime: {', '.join(PROVIDERS)} (cpu)"
    )
    parser.add_argument("--openvino", action="store_true", help="OpenVINO as well")
    parser.add_argument(
        "--profile", nargs=2, metavar=("MODEL", "VARIANT"), help="operators of one file, instead"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture, such as latency.png")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    variants = MODES[arguments.mode]
    if arguments.profile and arguments.profile[1] not in variants:
        parser.error(f"no variant {arguments.profile[1]!r}: expected one of {', '.join(map(repr, variants))}")
    first, *others = variants
    asked = others if arguments.variants is None else arguments.variants
    arguments.variants = [first, *(name for name in asked if name != first)]
    for variant in arguments.variants:
        if variant not in variants:
            parser.error(f"no variant {variant!r}: expected some of {', '.join(map(repr, others))}")
    for name in arguments.providers:
        if name not in PROVIDERS:
            parser.error(f"no provider {name!r}: expected some of {', '.join(PROVIDERS)}")
        if PROVIDERS[name][1] not in onnxruntime.get_available_providers():
            parser.error(f"--providers {name} needs onnxruntime-gpu and a GPU: it is not in onnxruntime here")
    if arguments.openvino and importlib.util.find_spec("openvino") is None:
        parser.error("--openvino needs OpenVINO: pip install openvino (pn-compiler[benchmark])")
    if arguments.plot is not None:
        _check_plot(parser, arguments.plot)
    return arguments


def _check_plot(parser: argparse.ArgumentParser, path: Path) -> None:
    try:
        known = latency_plot.file_types()
    except ImportError:
        parser.error("--plot needs matplotlib: pip install matplotlib (pn-compiler[benchmark])")
    if path.suffix.removeprefix(".").lower() not in known:
        parser.error(f"cannot plot to {path}: expected an ending out of {', '.join(known)}")


def _names(text: str) -> list[str]:
    return text.split(",")


def _titles(text: str) -> list[str]:
    return [part.strip() for part in text.split(";")]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    raise SystemExit(main())
