"""int8 on convolutional networks: what it saves, and what it costs in accuracy.

    python -m benchmarks.int8 --models resnet50 mobilenet_v2
    python -m benchmarks.int8 --images IMAGENET --models efficientnet-lite0

IMAGENET is a folder as for `benchmarks.real_networks`. Networks of torchvision have random weights, which is
no matter for the time, and no accuracy. Files are those of BatchNorm, of the default conversion, whose
normalizers compute statistics of each image in float32, and with static statistics (`--static-statistics`).
Ratios are to BatchNorm in float32, as in `benchmarks.latency`.
"""

import argparse
import dataclasses
import functools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import pn_compiler
from benchmarks import variants
from benchmarks.real_networks import data
from benchmarks.real_networks.measure import TASKS
from benchmarks.runtimes import onnxruntime_session
from examples.quantization import quantize
from pn_compiler.base.errors import ConfigError
from pn_compiler.export import make_session
from pn_compiler.export.tuning import take_turns

LITE = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
STATIC = "static statistics"


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A network, images to take ranges and constants from, and others to test it on, if there are labels."""

    network: nn.Module
    seen: Tensor
    test: Tensor
    labels: Tensor | None


def task(name: str, arguments: argparse.Namespace) -> Task:
    if name not in LITE:
        images = variants.image(name, arguments.pixels, arguments.samples)
        return Task(variants.build(name), images, images[:1], None)
    if arguments.images is None:
        raise ConfigError(f"{name} needs --images")
    options = data.Options(images=arguments.images, folds=1, recover=arguments.samples, limit=arguments.limit)
    (split,) = TASKS[name].splits(options)
    return Task(
        TASKS[name].load(options),
        split.recovery[: arguments.samples],
        split.test[: len(split.labels)],
        split.labels,
    )


def files(folder: Path, given: Task) -> dict[str, Path]:
    """Each network in float32 and int8, by name."""
    converted = pn_compiler.transform(given.network, given.seen[:1])
    frozen, _ = pn_compiler.freeze_statistics(converted, given.seen.split(16))
    networks = {"BatchNorm": given.network, "default": converted, STATIC: frozen}
    paths = {}
    for name, network in networks.items():
        exact, quantized = (folder / f"{name}.{dtype}.onnx" for dtype in ("float32", "int8"))
        pn_compiler.export_onnx(network, exact, given.seen[:2])
        quantize(exact, quantized, given.seen, everything=name != "default")
        paths |= {f"{name}, float32": exact, f"{name}, int8": quantized}
    return paths


def classes(path: Path, images: Tensor) -> Tensor:
    session = make_session(str(path))
    name = session.get_inputs()[0].name
    logits = [session.run(None, {name: batch.numpy()})[0] for batch in images.split(16)]
    return torch.from_numpy(np.concatenate(logits)).argmax(1)


def measured(
    paths: Mapping[str, Path], image: Tensor, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of an inference of each file, by round."""
    openers = {
        title: functools.partial(onnxruntime_session, path.read_bytes(), image.numpy(), arguments.threads)
        for title, path in paths.items()
    }
    return take_turns(openers, lambda: None, rounds=arguments.rounds, runs=arguments.runs)


def table(name: str, given: Task, arguments: argparse.Namespace) -> list[str]:
    """Markdown rows of one network."""
    with tempfile.TemporaryDirectory() as folder:
        paths = files(Path(folder), given)
        seconds = measured(paths, given.seen[:1], arguments)
        base = next(iter(seconds.values()))
        rows, reference = [], None
        for title, path in paths.items():
            ratio = statistics.median(a / b for a, b in zip(seconds[title], base, strict=True))
            cells = [name, title, f"{path.stat().st_size / 1e6:.1f}", f"{ratio:.2f}", "", ""]
            if given.labels is not None:
                found = classes(path, given.test)
                reference = found if reference is None else reference
                right, same = (found == given.labels).double().mean(), (found == reference).double().mean()
                cells[-2:] = [f"{100 * right:.1f}", f"{100 * same:.1f}"]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.int8",
    )
    parser.add_argument("--models", nargs="+", default=["resnet50", "mobilenet_v2"])
    parser.add_argument("--images", type=Path, metavar="DIR", help="an ImageNet folder")
    parser.add_argument("--samples", type=int, default=64, help="images to take ranges from (64)")
    parser.add_argument("--limit", type=int, help="the most images to use")
    parser.add_argument("--pixels", type=int, default=224, help="of networks with random weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=10, help="in a session")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime.quantization talks to the root logger
    print(
        "| network | file | MB | time | accuracy, % | same class, % |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name in arguments.models:
        print(*table(name, task(name, arguments), arguments), sep="\n", flush=True)
    print(f"\ntime to BatchNorm in float32: batch 1, {arguments.threads} threads of onnxruntime")


if __name__ == "__main__":
    main()
