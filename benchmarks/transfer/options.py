"""What is asked for: the settings that all runs share, and what tells one from the other."""

import dataclasses
from pathlib import Path

from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import check_number

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BATCH_SIZES = (1, 2, 8)
PRIVATE_BATCH_SIZES = (64,)  # noise is added once to a batch, whatever its size
RATED_BATCH = 2  # the batch size that rates are given for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What all runs of a table have in common.

    Attributes:
        cifar: a folder with train/ and test/, each with ten class folders.
        network: of `benchmarks.transfer.starts.BACKBONES`.
        pixels: of a side of an image.
        train: training images; None for those of the target.
        validation: other training images, to choose the learning rate with.
        test: test images.
        seeds: runs of each kind.
        distilled: whether converted networks are first distilled, without labels, on the training images.
        private: whether opacus trains.
    """

    cifar: Path | None = None
    network: str = "efficientnet-lite0"
    pixels: int = 96
    train: int | None = None
    validation: int = 500
    test: int = 1000
    seeds: int = 3
    distilled: bool = False
    private: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test", "seeds"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "1 or more", 1, whole=True)
        # strides of 32 leave one pixel, of which BatchNorm has no variance at batch size 1
        check_number("pixels", self.pixels, "33 or more", 33, whole=True)
        if self.private and self.distilled:
            raise ConfigError("--distilled reads the private images without noise: leave out it or --private")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        target: of `benchmarks.transfer.data.TARGETS`.
        method: of `benchmarks.transfer.starts.methods`.
        batch_size: images in a step.
        rate: learning rate at a batch size of 2; see `learning_rate`.
        seed: of the new head and of the order of the images.
    """

    target: str
    method: str
    batch_size: int
    rate: float
    seed: int

    @property
    def learning_rate(self) -> float:
        """In proportion to the batch size: a pass over the images then moves the weights about as far.

        That is the linear scaling rule, which holds for small batches (`benchmarks.small_batch` leaves it
        beyond 8); each batch size has its best rate near the same place of the grid.
        """
        return self.rate * self.batch_size / RATED_BATCH
