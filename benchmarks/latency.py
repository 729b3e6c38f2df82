"""How long an ONNX file takes, beside that of the same network with BatchNorm, in onnxruntime on a CPU.

    python -m benchmarks.latency --mode exact --json latency.json
    python -m benchmarks.latency --mode static --models resnet50,mobilenet_v2,efficientnet_b0

Each mode compares several files made from one network of torchvision, or the U-Net of `benchmarks.networks`,
the first with BatchNorm folded into the convolutions. Weights and running statistics are random, which is no
matter for the time. Sessions are opened one after the other, never two at a time, for the threads of an idle
one spin. In each round every file gets a session, forwards in one round and backwards in the next; its time
is the median of its runs. A ratio is the median over all rounds of the time to that of the first file in the
same round.
"""

import argparse
import dataclasses
import io
import itertools
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
from benchmarks.networks import UNet
from pn_compiler.export import DEFAULT_OPSET, make_session
from pn_compiler.testing import randomize_batch_norms
from tests import zoo

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "unet")
_WARM_UP = 3  # runs

#: makes a file of the network with a name, for images of a size in batches of a size
Variant = Callable[[str, int, int], bytes]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = UNet(classes=11) if name == "unet" else zoo.torchvision().models.get_model(name, weights=None)
    return randomize_batch_norms(network).eval()


def batch_norm(name: str, pixels: int, batch: int = 1) -> bytes:
    """As torch exports it; onnxruntime folds the normalization when it loads the file."""
    return _plain_export(build(name), _image(name, pixels, batch), DEFAULT_OPSET)


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
    """What `torch.onnx.export` makes of the converted network, with none of our work on it.

    Attributes:
        proxy: with proxy normalization, computed from its parameters in each run; else normalizers alone.
        opset_version: of the file.
    """

    proxy: bool
    opset_version: int = DEFAULT_OPSET

    def __call__(self, name: str, pixels: int, batch: int = 1) -> bytes:
        image = _image(name, pixels, batch)
        converted = pn_compiler.transform(build(name), image, proxy=self.proxy, warm_start="none")
        return _plain_export(converted.eval(), image, self.opset_version)


def _plain_export(network: nn.Module, image: Tensor, opset_version: int) -> bytes:
    program = torch.onnx.export(network, (image,), dynamo=True, opset_version=opset_version, verbose=False)
    assert program is not None
    content = io.BytesIO()
    program.save(content)
    return content.getvalue()


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """What pn_compiler makes of it, with these options of `pn_compiler.transform`."""

    options: Mapping[str, Any]

    def __call__(self, name: str, pixels: int, batch: int = 1) -> bytes:
        image = _image(name, pixels)
        return _exported(pn_compiler.transform(build(name), image, **self.options), image)


def _exported(network: nn.Module, image: Tensor) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        pn_compiler.export_onnx(network, path, image)  # verified, too
        return path.read_bytes()


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """All statistics constant, after a conversion with these options of `pn_compiler.transform`."""

    options: Mapping[str, Any]

    def __call__(self, name: str, pixels: int, batch: int = 1) -> bytes:
        converted = pn_compiler.transform(build(name), **self.options)
        samples = _image(name, 64, batch=4)  # what the constants are does not matter
        frozen, report = pn_compiler.freeze_statistics(converted, samples)
        assert report.frozen == len(report.sites)
        return _exported(frozen, _image(name, pixels))


def _image(name: str, pixels: int, batch: int = 2) -> Tensor:
    channels = 1 if name == "unet" else 3
    return torch.randn(batch, channels, pixels, pixels, generator=torch.Generator().manual_seed(0))


#: what is compared; the first is what the others are measured by
MODES: dict[str, dict[str, Variant]] = {
    "exact": {
        "BatchNorm": batch_norm,
        "normalizer, plain export": Plain(proxy=False),
        "the same, opset 24": Plain(proxy=False, opset_version=24),
        "normalizer + PN, plain export": Plain(proxy=True),
        "pn_compiler, PN everywhere": Compiled({"warm_start": "none"}),
        "pn_compiler, after a warm start": Compiled({}),
    },
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
    name: str, files: Mapping[str, bytes], arguments: argparse.Namespace, batch: int, threads: int
) -> list[dict[str, Any]]:
    """One for each file."""
    seconds = measure(
        files, _image(name, arguments.pixels, batch), threads=threads, rounds=arguments.rounds,
        runs=arguments.runs, title=f"{name}, {threads} threads",
    )  # fmt: skip
    base = next(iter(seconds.values()))
    return [
        {
            "model": name,
            "batch": batch,
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
    parser.add_argument("--models", default=",".join(NETWORKS))
    parser.add_argument("--batches", default="1", help="batch sizes")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runs", type=int, default=20, help="in a session, besides some to warm up")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    found = []
    print(f"load average {os.getloadavg()[0]:.1f} at the start; what else runs changes ratios, too")
    print(f"{'model':<17}{'batch':>6}{'threads':>8}  {'variant':<34}{'ms':>8}{'ratio':>8}")
    sizes, counts = ([*map(int, text.split(","))] for text in (arguments.batches, arguments.threads))
    for name, batch in itertools.product(arguments.models.split(","), sizes):
        bar = tqdm(MODES[arguments.mode].items(), desc=f"{name}: files", disable=None, leave=False)
        files = {variant: make(name, arguments.pixels, batch) for variant, make in bar}
        for row in itertools.chain(*(rows(name, files, arguments, batch, threads) for threads in counts)):
            found.append(row)
            print(
                f"{name:<17}{batch:>6}{row['threads']:>8}  {row['variant']:<34}{row['milliseconds']:>8.2f}"
                f"{row['ratio']:>8.3f}",
                flush=True,
            )
    print(
        f"{arguments.pixels} x {arguments.pixels} pixels, float32, {arguments.rounds} sessions of "
        f"{arguments.runs} runs each, load average {os.getloadavg()[0]:.1f} at the end"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
