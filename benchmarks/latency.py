"""How long an ONNX file takes, beside that of the same network with BatchNorm, in onnxruntime on a CPU.

    python -m benchmarks.latency --mode static --threads 1,2 --json latency.json

Each mode compares several files made from one network of torchvision, the first with BatchNorm folded into
the convolutions. Weights and running statistics are random, which is no matter for the time. Sessions are
opened one after the other, never two at a time, for the threads of an idle one spin. In each round every
file gets a session, forwards in one round and backwards in the next; its time is the median of its runs. A
ratio is the median over all rounds of the time to that of the first file in the same round.
"""

import argparse
import dataclasses
import io
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import pn_compiler
from pn_compiler.export import DEFAULT_OPSET, make_session
from pn_compiler.testing import randomize_batch_norms
from tests import zoo

_CALIBRATION = (4, 3, 64, 64)  # what the constants are does not matter
_WARM_UP = 3  # runs

#: makes a file of the network with a name, for images of a size
Variant = Callable[[str, int], bytes]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(zoo.torchvision().models.get_model(name, weights=None)).eval()


def batch_norm(name: str, pixels: int) -> bytes:
    """As torch exports it; onnxruntime folds the normalization when it loads the file."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        build(name), (_image(pixels),), dynamo=True, opset_version=DEFAULT_OPSET, verbose=False,
        dynamic_shapes=({0: batch},),
    )  # fmt: skip
    assert program is not None
    content = io.BytesIO()
    program.save(content)
    return content.getvalue()


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """All statistics constant, after a conversion with these options of `pn_compiler.transform`."""

    options: Mapping[str, Any]

    def __call__(self, name: str, pixels: int) -> bytes:
        converted = pn_compiler.transform(build(name), **self.options)
        frozen, report = pn_compiler.freeze_statistics(converted, torch.randn(_CALIBRATION))
        assert report.frozen == len(report.sites)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            pn_compiler.export_onnx(frozen, path, _image(pixels))  # verified, too
            return path.read_bytes()


def _image(pixels: int) -> Tensor:
    return torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))


#: what is compared; the first is what the others are measured by
MODES: dict[str, dict[str, Variant]] = {
    "static": {
        "BatchNorm": batch_norm,
        "warm start": Frozen({}),
        "PN everywhere": Frozen({"warm_start": "none"}),
        "PN everywhere, reference padding": Frozen({"warm_start": "none", "proxy_padding": "output"}),
    },
}


def measure(
    files: Mapping[str, bytes], image: Tensor, *, threads: int, rounds: int, runs: int, title: str
) -> dict[str, list[float]]:
    """Seconds of one inference, the median of a session, for each file and round."""
    seconds: dict[str, list[float]] = {variant: [] for variant in files}
    with tqdm(total=rounds * len(files), desc=title, disable=None, leave=False) as bar:
        for index in range(rounds):
            for variant in list(files) if index % 2 else reversed(files):
                seconds[variant].append(_session(files[variant], image, threads, runs))
                bar.update()
    return seconds


def _session(content: bytes, image: Tensor, threads: int, runs: int) -> float:
    """Median of the seconds of `runs` runs in a session of their own."""
    session = make_session(content, threads=threads)
    feed = {session.get_inputs()[0].name: np.ascontiguousarray(image.numpy())}
    times = []
    for _ in range(_WARM_UP + runs):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return statistics.median(times[_WARM_UP:])


def rows(
    name: str, files: Mapping[str, bytes], arguments: argparse.Namespace, threads: int
) -> list[dict[str, Any]]:
    """One for each file."""
    seconds = measure(
        files, _image(arguments.pixels)[:1], threads=threads, rounds=arguments.rounds, runs=arguments.runs,
        title=f"{name}, {threads} threads",
    )  # fmt: skip
    base = next(iter(seconds.values()))
    return [
        {
            "model": name,
            "threads": threads,
            "variant": variant,
            "milliseconds": 1e3 * statistics.median(times),
            "ratio": statistics.median(a / b for a, b in zip(times, base, strict=True)),
        }
        for variant, times in seconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=list(MODES), required=True)
    parser.add_argument("--models", default="resnet50,mobilenet_v2,efficientnet_b0")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runs", type=int, default=20, help="in a session, besides some to warm up")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    found = []
    print(f"load average {os.getloadavg()[0]:.1f} at the start; what else runs changes ratios, too")
    print(f"{'model':<17}{'threads':>8}  {'variant':<34}{'ms':>8}{'ratio':>8}")
    for name in arguments.models.split(","):
        variants = MODES[arguments.mode]
        bar = tqdm(variants.items(), desc=f"{name}: files", disable=None, leave=False)
        files = {variant: make(name, arguments.pixels) for variant, make in bar}
        for threads in map(int, arguments.threads.split(",")):
            for row in rows(name, files, arguments, threads):
                found.append(row)
                print(
                    f"{name:<17}{threads:>8}  {row['variant']:<34}{row['milliseconds']:>8.2f}"
                    f"{row['ratio']:>8.3f}",
                    flush=True,
                )
    print(
        f"1 x 3 x {arguments.pixels} x {arguments.pixels}, float32, {arguments.rounds} sessions of "
        f"{arguments.runs} runs each, load average {os.getloadavg()[0]:.1f} at the end"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
