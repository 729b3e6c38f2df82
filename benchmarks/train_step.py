"""Cost of proxy normalization in training, against the same normalizers without it, GroupNorm and BatchNorm.

    python -m benchmarks.train_step --models resnet50,mobilenet_v2,efficientnet_b0 --json train_step.json
    python -m benchmarks.train_step --norm rms

All networks come from the same untrained torchvision model (warm_start="none", so that every activation
behind a normalizer gets proxy normalization); GroupNorm is norm="layer" without it. "rms" has the default
anchor. Steps (forward + backward) and evaluations of two networks alternate in one process; each ratio is
the median of the ratios of neighbours. Memory is the largest resident size of a process that takes two steps,
less that of one that has only built the network.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import pn_compiler
from pn_compiler.base.config import DEFAULT_ANCHOR
from pn_compiler.testing import count_modules
from tests import zoo

COLUMNS = ("sites", "train step", "eval", "memory", "of BatchNorm", "of GroupNorm")
VARIANTS = ("batch", "group", "norm", "norm + proxy")


def make(name: str, variant: str, arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = zoo.torchvision().models.get_model(name, weights=None).train()
    if variant == "batch":
        return model
    options: dict[str, Any] = {"warm_start": "none", "proxy": variant == "norm + proxy"}
    if arguments.norm == "rms" and variant != "group":
        options |= {"norm": "rms", "anchor": DEFAULT_ANCHOR}
    model = pn_compiler.transform(model, num_groups=arguments.num_groups, **options)
    if not arguments.private:
        return model
    from opacus import GradSampleModule  # optional, as the module beside

    from pn_compiler.integrations.opacus import prepare

    return GradSampleModule(prepare(model))


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor) -> None:
    model(x)


def ratio(
    function: Callable[[nn.Module, Tensor], None], models: list[nn.Module], x: Tensor, runs: int
) -> float:
    """Median of seconds of the second over seconds of the first, run in turn."""
    ratios = []
    for run in tqdm(range(runs + 1), disable=None, leave=False):
        seconds = []
        for model in models if run % 2 else models[::-1]:
            start = time.perf_counter()
            function(model, x)
            seconds.append(time.perf_counter() - start)
        first, second = seconds if run % 2 else seconds[::-1]
        if run:  # the first warms up
            ratios.append(second / first)
    return statistics.median(ratios)


def memory(name: str, variant: str, arguments: argparse.Namespace) -> int:
    """Bytes that two steps need beyond the network, measured in a process of their own."""
    sizes = []
    # glibc then gives freed tensors back to the system: what counts is what is in use, not how it lies
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for steps in (0, 2):
        command = [
            sys.executable, "-m", "benchmarks.train_step", "--measure-memory", f"{name},{variant},{steps}",
            "--norm", arguments.norm, "--batch", str(arguments.batch), "--pixels", str(arguments.pixels),
            "--num-groups", str(arguments.num_groups),
            *(("--private",) if arguments.private else ()),
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        sizes.append(int(done.stdout))
    return sizes[1] - sizes[0]


def measure_memory(name: str, variant: str, steps: int, arguments: argparse.Namespace) -> int:
    """The largest resident size of this process, in bytes, after `steps` steps."""
    model = make(name, variant, arguments)
    x = torch.randn(arguments.batch, 3, arguments.pixels, arguments.pixels)
    for _ in range(steps):
        step(model, x)
    # of this program's own memory; getrusage would count the parent's as well
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(peak.split()[1]) * 1024


def bench(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    _, _, plain, proxied = models = [make(name, variant, arguments) for variant in VARIANTS]
    x = torch.randn(arguments.batch, 3, arguments.pixels, arguments.pixels)
    row: dict[str, Any] = {"model": name}
    row["sites"] = count_modules(proxied, pn_compiler.nn.ProxyNormAct)
    row["train step"] = ratio(step, [plain, proxied], x, arguments.runs)
    for reference, column in zip(models[:2], ("of BatchNorm", "of GroupNorm"), strict=True):
        # without proxy normalization, "layer" is GroupNorm; opacus takes no BatchNorm
        if not (arguments.private or (column == "of GroupNorm" and arguments.norm == "layer")):
            row[column] = ratio(step, [reference, proxied], x, arguments.runs)
    for model in (plain, proxied):
        model.eval()
    row["eval"] = ratio(evaluate, [plain, proxied], x, arguments.runs)
    del models, plain, proxied, reference, model
    without, with_proxy = (memory(name, variant, arguments) for variant in VARIANTS[2:])
    row["memory"] = with_proxy / without
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet50,mobilenet_v2,efficientnet_b0")
    parser.add_argument("--norm", choices=["layer", "rms"], default="layer")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--num-groups", type=int, default=1)
    parser.add_argument("--private", action="store_true", help="gradients of each sample, by opacus")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.measure_memory:
        name, variant, steps = arguments.measure_memory.split(",")
        print(measure_memory(name, variant, int(steps), arguments))
        return
    print(f"{'model':<18}" + "".join(f"{column:>14}" for column in COLUMNS) + "   with proxy / without")
    rows = []
    for name in arguments.models.split(","):
        rows.append(row := bench(name, arguments))
        cells = [row.get(column, math.nan) for column in COLUMNS]
        print(f"{name:<18}{cells[0]:>14}" + "".join(f"{value:>14.3f}" for value in cells[1:]))
    print(
        f"{arguments.batch} x 3 x {arguments.pixels} x {arguments.pixels}, norm={arguments.norm}, "
        f"{arguments.num_groups} groups, float32, {torch.get_num_threads()} threads, "
        f"median of {arguments.runs}, torch {torch.__version__}"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
