"""The images that networks are fine-tuned on, to choose the learning rate with, and to test with."""

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.transfer.options import Options
from pn_compiler.base.errors import ConfigError
from pn_compiler.data.class_folders import class_labels
from pn_compiler.data.image_folder import RGB, ImageFolder, Preprocessing

CLASSES = 10  # of either target
MEAN, STD = 127 / 255, 128 / 255  # (x - 127) / 128 of values from 0 to 255, as EfficientNet-Lite was trained
DIGITS_TEST = 597  # of 1,797

Part = tuple[Tensor, Tensor]  # images [N, 3, H, W] and labels [N]


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A task to fine-tune for.

    Attributes:
        load: the images, by part: "train", "validation", "test"; the two ints are the sizes of the first two.
        train: training images, unless the options say how many.
        needs: the option without which it is left out.
    """

    load: Callable[[Options, int, int], dict[str, Part]]
    train: int
    needs: str | None = None


def cifar10(options: Options, train: int, validation: int) -> dict[str, Part]:
    """Training and validation images are different ones of train/, the same for every seed."""
    assert options.cifar is not None
    side = options.pixels
    preprocessing = Preprocessing(
        RGB, mean=(MEAN,), std=(STD,), resize=(side, side), interpolation="bicubic"
    )  # fmt: skip
    seen = _images(options.cifar / "train", preprocessing, train + validation)
    return _divided(seen, train, validation) | {
        "test": _images(options.cifar / "test", preprocessing, options.test)
    }


def _images(folder: Path, preprocessing: Preprocessing, count: int) -> Part:
    images = ImageFolder.open(folder, preprocessing)
    labels = torch.tensor(class_labels(folder, images.paths, CLASSES))
    _check_enough(str(folder), len(images), count)
    rows = random.Random(0).sample(range(len(images)), count)
    images = dataclasses.replace(images, paths=[images.paths[row] for row in rows])
    return images[:], labels[rows]


def digits(options: Options, train: int, validation: int) -> dict[str, Part]:
    """scikit-learn's digits, upsampled and gray in all three channels."""
    values, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rest, test = rows[:-DIGITS_TEST], rows[-DIGITS_TEST:][: options.test]
    _check_enough("digits", len(rest), train + validation)
    _check_enough("the test set of digits", len(test), min(options.test, DIGITS_TEST))
    images = F.interpolate(
        values.float().reshape(-1, 1, 8, 8) / 16, (options.pixels,) * 2, mode="bicubic", align_corners=False
    )
    images = images.clamp(0, 1).sub(MEAN).div(STD).expand(-1, 3, -1, -1)
    seen = images[rest], labels[rest]
    return _divided(seen, train, validation) | {"test": (images[test], labels[test])}


def _divided(seen: Part, train: int, validation: int) -> dict[str, Part]:
    images, labels = seen
    return {
        "train": (images[:train], labels[:train]),
        "validation": (images[train : train + validation], labels[train : train + validation]),
    }


def _check_enough(where: str, there: int, needed: int) -> None:
    if there < needed:
        raise ConfigError(f"{where} has {there} images: too few for {needed}")


TARGETS: Mapping[str, Target] = {
    "cifar10": Target(cifar10, train=1500, needs="cifar"),
    "digits": Target(digits, train=700),
}


def training_images(target: str, options: Options) -> int:
    """How many there are to train with."""
    return TARGETS[target].train if options.train is None else options.train


@functools.lru_cache(maxsize=1)  # a third of a gigabyte
def load(target: str, options: Options) -> dict[str, Part]:
    """All parts of a target, in memory.

    Raises:
        ConfigError: it has too few images, or they cannot be read.
    """
    return TARGETS[target].load(options, training_images(target, options), options.validation)
