"""What the networks are tested on, and what they may be recovered with: never the same samples."""

import dataclasses
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.real_networks import sounds
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import check_number
from pn_compiler.data.class_folders import class_labels
from pn_compiler.data.image_folder import RGB, ImageFolder, Preprocessing

IMAGENET_CLASSES, CIFAR_CLASSES = 1000, 10
CIFAR = Preprocessing(RGB, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where the data are, and how many of them serve which purpose.

    Attributes:
        images: an ImageNet folder.
        cifar: a folder with train/ and test/, each with ten class folders.
        weights: a folder with the weights of the CIFAR ResNets.
        sounds: how many are synthesised.
        recover: how many samples, without labels, a network is recovered with.
        folds: parts that ImageNet's images are divided into; see `imagenet`.
        limit: the most samples to test on.
        seed: of the order of samples, and of sounds.
        contrast: factor of the inputs that are tested with, below 1 for images of lower contrast and softer
            sounds than the network was trained on.
    """

    images: Path | None = None
    cifar: Path | None = None
    weights: Path | None = None
    sounds: int | None = None
    recover: int = 400
    folds: int = 5
    limit: int | None = None
    seed: int = 0
    contrast: float = 1.0

    def __post_init__(self) -> None:
        for name in ("sounds", "recover", "folds", "limit"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "1 or more", 1, whole=True)
        check_number("contrast", self.contrast, "a number above 0", sys.float_info.min)


class Inputs(Protocol):
    """Inputs [N, *] of a network; a slice of them is a tensor."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """Samples to recover a network with, and others to test it on.

    Attributes:
        recovery, test: inputs.
        labels: of `test`; classes, or the pitch in cents.
    """

    recovery: Inputs
    test: Inputs
    labels: Tensor


def imagenet(options: Options, pixels: int) -> list[Split]:
    """Images of `pixels` on a side, in random order, cut into folds.

    Each fold is tested with a network that was recovered with the first `recover` images of the others, so
    that every image is tested on, and none by a network that has seen it. With one fold, the first
    `recover` images recover and all others test.
    """
    assert options.images is not None
    # as these networks were trained: bicubic, and (x - 127) / 128 of values from 0 to 255
    preprocessing = Preprocessing(
        RGB, mean=(127 / 255,), std=(128 / 255,), resize=pixels + 32, crop=pixels, interpolation="bicubic"
    )
    images, labels = _shuffled(options.images, preprocessing, IMAGENET_CLASSES, options.seed)
    rows = list(range(len(images)))[: options.limit]
    folds, recover = options.folds, options.recover
    if folds == 1:
        parts = [(rows[:recover], rows[recover:])]
    else:
        parts = [([row for row in rows if row % folds != fold], rows[fold::folds]) for fold in range(folds)]
    if not all(seen and tested for seen, tested in parts):
        raise ConfigError(f"{options.images} has {len(rows)} images: too few for {recover} to recover with")
    return [
        Split(_only(images, seen[:recover]), _only(images, tested), labels[tested]) for seen, tested in parts
    ]


def cifar10(options: Options) -> list[Split]:
    """All test images; training images recover."""
    assert options.cifar is not None
    seen, _ = _shuffled(options.cifar / "train", CIFAR, CIFAR_CLASSES, options.seed)
    images, labels = _shuffled(options.cifar / "test", CIFAR, CIFAR_CLASSES, options.seed)
    rows = list(range(len(images)))[: options.limit]
    return [Split(_only(seen, range(min(options.recover, len(seen)))), _only(images, rows), labels[rows])]


def pitches(options: Options) -> list[Split]:
    """Sounds of two seeds."""
    frames, labels = sounds.synthesize(options.sounds or 0, options.seed)
    return [Split(sounds.synthesize(options.recover, options.seed + 1)[0], frames, labels)]


def _shuffled(
    folder: Path, preprocessing: Preprocessing, classes: int, seed: int
) -> tuple[ImageFolder, Tensor]:
    images = ImageFolder.open(folder, preprocessing)
    labels = torch.tensor(class_labels(folder, images.paths, classes))
    order = random.Random(seed).sample(range(len(images)), len(images))
    return _only(images, order), labels[order]


def _only(images: ImageFolder, rows: Sequence[int]) -> ImageFolder:
    return dataclasses.replace(images, paths=[images.paths[row] for row in rows])
