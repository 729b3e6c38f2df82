"""A folder of images as samples, preprocessed as by torchvision's transforms. Imports Pillow."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pn_compiler.base.errors import ConfigError, first_line
from pn_compiler.base.option_checks import one_of
from pn_compiler.base.regular_files import why_unreadable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # no others: for some Pillow runs Ghostscript
GRAY, RGB = 1, 3  # channels

Size = int | Sequence[int]
Interpolation = Literal["bilinear", "bicubic"]
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclasses.dataclass(frozen=True, slots=True)
class Preprocessing:
    """Does what torchvision's ``Resize``, ``CenterCrop``, ``ToTensor`` and ``Normalize`` do, in this order.

    Attributes:
        channels: 1 (gray) or 3 (RGB).
        mean: one per channel, or one for all, on the scale 0 to 1; requires `std`.
        std: values become (pixel / 255 - mean) / std. Without mean and std they stay between 0 and 1.
        resize: pixels of the shorter side, or (height, width).
        crop: side of the central square to crop, or (height, width); smaller images are padded with black.
        interpolation: of `resize`, "bilinear" or "bicubic", with antialiasing.

    Raises:
        ConfigError: a value makes no sense.
    """

    channels: int
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    resize: Size | None = None
    crop: Size | None = None
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.channels not in (GRAY, RGB):
            raise ConfigError(f"the model takes {self.channels} channels, and images have 1 or 3")
        if (self.mean is None) != (self.std is None):
            raise ConfigError("mean and std go together: give both or neither")
        one_of("interpolation", self.interpolation, get_args(Interpolation))
        if self.interpolation != "bilinear" and self.resize is None:
            raise ConfigError("interpolation is that of resize: give that, too")
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and not _is_size(size):
                raise ConfigError(f"{name} {size!r}: expected pixels, or (height, width)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, self.channels):
                raise ConfigError(f"{name} has {len(values)} values, and the images {self.channels} channels")
        if not all(0 <= value <= 1 for value in self.mean or ()):
            raise ConfigError(f"mean {self.mean}: expected values of pixels on the scale 0 to 1, not to 255")
        if not all(0 < value < math.inf for value in self.std or ()):
            raise ConfigError(f"std {self.std}: expected positive values, for pixels on the scale 0 to 1")

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """[H, W, C] of an RGB image, converted to gray, resized and cropped as configured."""
        if self.channels == GRAY:
            image = image.convert("L")
        if self.resize is not None:
            image = image.resize(_resized(image.size, self.resize), _FILTERS[self.interpolation])
        if self.crop is not None:
            image = image.crop(_box(image.size, self.crop))
        return np.array(image).reshape(image.height, image.width, self.channels)

    def values(self, pixels: Tensor) -> Tensor:
        """uint8 [N, H, W, C] -> float32 [N, C, H, W]."""
        values = pixels.permute(0, 3, 1, 2).contiguous().to(torch.float32).div(255)
        if self.mean is None or self.std is None:
            return values
        mean, std = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (self.mean, self.std))
        return values.sub_(mean).div_(std)


def _is_size(size: Size) -> bool:
    if isinstance(size, int):
        return size > 0
    return len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)


def _resized(size: tuple[int, int], to: Size) -> tuple[int, int]:
    """(width, height) -> (width, height), with torchvision's rounding."""
    if not isinstance(to, int):
        return to[1], to[0]
    width, height = size
    return (to, int(to * height / width)) if width <= height else (int(to * width / height), to)


def _box(size: tuple[int, int], crop: Size) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a (width, height) image's central crop, with torchvision's rounding."""
    height, width = (crop, crop) if isinstance(crop, int) else crop
    left, top = (
        round((old - new) / 2) if old >= new else -((new - old) // 2)
        for old, new in zip(size, (width, height), strict=True)
    )
    return left, top, left + width, top + height


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFolder:
    """Images [N, C, H, W], float32, which are decoded when rows are read.

    Attributes:
        paths: paths of the files, sorted.
        preprocessing: applied to each image.
        size: (height, width) of the first image after preprocessing; all must have it.
    """

    paths: Sequence[str]
    preprocessing: Preprocessing
    size: tuple[int, int]

    @classmethod
    def open(cls, folder: Path, preprocessing: Preprocessing) -> "ImageFolder":
        """All images in `folder` and its subfolders. Only the first is decoded.

        Raises:
            ConfigError: there is none, or the first cannot be read.
        """
        paths = find_images(folder)
        if not paths:
            raise ConfigError(f"{folder} holds no images: expected files {', '.join(EXTENSIONS)}")
        height, width, _ = preprocessing.pixels(read_image(paths[0])).shape
        return cls(paths, preprocessing, (height, width))

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), self.preprocessing.channels, *self.size

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: slice) -> Tensor:
        """[rows, C, H, W]. Raises ConfigError where an image cannot be read or has another size."""
        pixels = [self._pixels(path) for path in self.paths[rows]]
        return self.preprocessing.values(torch.from_numpy(np.stack(pixels)))

    def _pixels(self, path: str) -> NDArray[np.uint8]:
        pixels = self.preprocessing.pixels(read_image(path))
        if pixels.shape[:2] != self.size:
            how = "--resize H,W or --crop" if self.preprocessing.resize else "--resize and --crop"
            (h1, w1), (h2, w2) = self.size, pixels.shape[:2]
            raise ConfigError(
                f"images differ in size (height x width): {self.paths[0]} has {h1}x{w1} and {path} {h2}x{w2} "
                f"pixels: make them equal with {how}"
            )
        return pixels


def find_images(folder: Path) -> list[str]:
    """The images in `folder` and its subfolders, by extension, sorted; hidden ones are skipped.

    Raises:
        ConfigError: a folder cannot be read.
    """
    images, seen = [], set()
    for root, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        place = os.path.realpath(root)
        if place in seen:  # a link back to a parent folder
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = (name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith("."))
        images += [os.path.join(root, name) for name in names]
    return sorted(images)


def _refuse(error: OSError) -> None:
    raise ConfigError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def read_image(path: str) -> Image.Image:
    """Reads an image in RGB, as torchvision's default loader does.

    Palettes are resolved. Transparency is dropped. The EXIF orientation is not applied. Of several frames,
    the first is read. 16-bit gray is clipped at 255, which leaves little more than white.

    Raises:
        ConfigError: there is no such file, or it is damaged or not an image.
    """
    if reason := why_unreadable(path):
        raise ConfigError(f"cannot read the image {path}: {reason}")
    try:
        with open(path, "rb") as file:
            return Image.open(file, formats=_FORMATS).convert("RGB")
    except UnidentifiedImageError as error:
        raise ConfigError(f"cannot read the image {path}: it is damaged, or not an image") from error
    except Exception as error:  # a damaged file can raise anything
        cause = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"cannot read the image {path}: {cause}") from error
