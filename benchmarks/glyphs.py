"""Rendered characters: 62 classes (0-9, A-Z, a-z), 32x32 gray images, in the fonts that matplotlib ships.

    images, labels = glyphs.load("train", size=16384, seed=0)

Each image shows one character in a random font of its split, under a random affine map and stroke width, dark
on light or light on dark at random contrast, with pieces of other characters at its edges, lines across it,
and noise. Test fonts are one whole family that is not trained on. The same arguments give the same images;
they are kept in `cache_folder()`.
"""

import hashlib
import os
import string
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from pn_compiler.base.errors import ConfigError

Split = Literal["train", "test"]
CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase
PIXELS = 32
# Of what matplotlib ships, the fonts in which all 62 characters are letters and digits in their usual shape.
# Of the others some have no letters (STIXSiz*, STIXNonUni*, *Display), some have other symbols at their codes
# (cmex10, cmsy10, LastResortHE), and cmmi10 has text figures, whose 0 and 1 are a small o and a small I.
FONTS: dict[str, tuple[str, ...]] = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
        "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
        "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
        "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10",
    ),
    "test": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
}  # fmt: skip
_CANVAS = 3 * PIXELS  # a character is drawn in the middle of this, three times as large as it will be
_EM = 80  # pixels of the canvas; a capital is 0.7 of it


def load(split: Split, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`size` images, float32 [size, 1, 32, 32] from 0 to 1, and their classes, int64 [size].

    Args:
        split: "train" or "test"; the two share no font.
        size: number of images; the classes are drawn at random.
        seed: of the images. A larger `size` with the same seed begins with the same images.

    Raises:
        ConfigError: an unknown split or a negative size.
    """
    if split not in FONTS or size < 0:
        raise ConfigError(
            f"split={split!r}, size={size}: expected 'train' or 'test', and a size of 0 or more"
        )
    # a change of this file, or of what draws, is a new data set
    text = f"{split} {size} {seed} {Image.__version__} {np.__version__} {matplotlib.__version__}"
    digest = hashlib.sha256(Path(__file__).read_bytes() + text.encode()).hexdigest()[:16]
    path = cache_folder() / f"{split}-{size}-{seed}-{digest}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # two processes may do this at once
            made = Path(folder) / path.name
            np.savez(made, **dict(zip(("images", "labels"), render(split, size, seed), strict=True)))
            os.replace(made, path)
    with np.load(path) as stored:
        images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
    return images.unsqueeze(1).float() / 255, labels


def cache_folder() -> Path:
    """Where rendered data sets are cached: the user's cache folder, outside of the repository."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pn_compiler" / "glyphs"


def render(split: Split, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [size, 32, 32], labels int64 [size])."""
    random = np.random.default_rng((seed, sorted(FONTS).index(split)))
    images = np.empty((size, PIXELS, PIXELS), np.uint8)
    labels = np.empty(size, np.int64)
    for row in tqdm(range(size), disable=None, leave=False, desc=f"rendering {split}"):
        labels[row] = random.integers(len(CLASSES))
        images[row] = _image(random, FONTS[split], CLASSES[labels[row]])
    return images, labels


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    """The font in the size of the canvas; ConfigError if a class looks like a missing character in it."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    if not path.exists():
        raise ConfigError(f"matplotlib {matplotlib.__version__} ships no font {name}: {path} does not exist")
    font = ImageFont.truetype(str(path), _EM, layout_engine=ImageFont.Layout.BASIC)
    missing = bytes(font.getmask("\U0010fffd"))
    absent = [c for c in CLASSES if not any(mask := bytes(font.getmask(c))) or mask == missing]
    if absent:
        raise ConfigError(f"{path} has no glyphs for {''.join(absent)}")
    return font


def _image(random: Generator, fonts: tuple[str, ...], character: str) -> np.ndarray:
    """One image, uint8 [32, 32]."""
    ink = _placed(random, fonts, character, offset=random.uniform(-2.5, 2.5, 2))
    clutter = np.zeros_like(ink)
    for _ in range(random.integers(0, 3)):  # pieces of neighbours, pushed over an edge
        angle = random.uniform(0, 2 * np.pi)
        away = random.uniform(20, 26) * np.array([np.cos(angle), np.sin(angle)])
        other = CLASSES[random.integers(len(CLASSES))]
        clutter = np.maximum(clutter, _placed(random, fonts, other, offset=away))
    if random.random() < 0.3:
        clutter = np.maximum(clutter, random.uniform(0.3, 0.8) * _line(random))
    ink = np.maximum(ink, clutter)
    paper = random.uniform(0, 0.5)
    contrast = random.uniform(0.45, 1 - paper)
    slope = random.uniform(-0.15, 0.15, 2) @ (np.mgrid[:PIXELS, :PIXELS].reshape(2, -1) / PIXELS - 0.5)
    gray = paper + contrast * ink + slope.reshape(ink.shape)
    if random.random() < 0.5:
        gray = 1 - gray
    gray += random.uniform(0, 0.08) * random.standard_normal(gray.shape)
    return (255 * gray.clip(0, 1)).round().astype(np.uint8)


def _placed(random: Generator, fonts: tuple[str, ...], character: str, offset: np.ndarray) -> np.ndarray:
    """Coverage from 0 to 1, [32, 32], of a character under a random affine map, moved by `offset` pixels."""
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    stroke = int(random.integers(0, 3))
    place = (_CANVAS / 2, _CANVAS / 2 + 0.35 * _EM)  # by the baseline: p and P keep their heights
    font = _font(fonts[random.integers(len(fonts))])
    ImageDraw.Draw(canvas).text(place, character, fill=255, font=font, anchor="ms", stroke_width=stroke)
    angle, shear = random.normal(0, 0.1), random.normal(0, 0.1)
    zoom = np.exp(random.normal(0, 0.08, 2)) * _CANVAS / PIXELS
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = turn @ np.array([[1, shear], [0, 1]]) @ np.diag(zoom)  # from the image to the canvas
    start = np.full(2, _CANVAS / 2) - inverse @ (PIXELS / 2 + offset)
    # reduced after the map at twice the size: bilinear sampling alone would skip thin strokes
    coefficients = np.hstack([inverse / 2, start[:, None]]).ravel().tolist()
    twice = (2 * PIXELS, 2 * PIXELS)
    mapped = canvas.transform(twice, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(mapped.reduce(2), np.float64) / 255


def _line(random: Generator) -> np.ndarray:
    """Coverage, [32, 32], of a line between two random points."""
    drawn = Image.new("L", (2 * PIXELS, 2 * PIXELS))
    ends = [float(v) for v in random.uniform(0, 2 * PIXELS, 4)]
    ImageDraw.Draw(drawn).line(ends, fill=255, width=int(random.integers(1, 4)))
    return np.asarray(drawn.reduce(2), np.float64) / 255
