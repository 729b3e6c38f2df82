"""Scenes of digits to segment: 48x48 gray images, each pixel background or one of the ten digits.

    images, masks = scenes.load("train", size=8192, seed=0)

Up to seven digits of `benchmarks.glyphs` that do not touch, each in a gray of its own, on darker paper with a
slope and noise, with lines across. Lines are background. Test fonts are not trained on.
"""

import inspect
import string

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from tqdm import tqdm

from benchmarks import glyphs
from benchmarks.cache import Tensors, cached

CLASSES = ("background", *string.digits)
PIXELS = 48
_MARGIN = (glyphs.PIXELS - 16) // 2  # a digit's frame may stand over the edge by this, its ink hardly


def load(split: glyphs.Split, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`size` images, float32 [size, 1, 48, 48] from 0 to 1, and their masks, int64 [size, 48, 48].

    Args:
        split: "train" or "test"; the two share no font.
        size: number of images.
        seed: of the images. A larger `size` with the same seed begins with the same images.
    """
    settings = f"{split} {size} {seed} {glyphs.Image.__version__} {np.__version__}"
    source = settings + inspect.getsource(glyphs) + inspect.getsource(inspect.getmodule(load))
    stored = cached("scenes", f"{split}-{size}-{seed}", source, lambda: render(split, size, seed))
    return stored["images"].unsqueeze(1).float() / 255, stored["masks"].long()


def render(split: glyphs.Split, size: int, seed: int) -> Tensors:
    """{"images": uint8 [size, 48, 48], "masks": uint8 [size, 48, 48]}."""
    random = np.random.default_rng((seed, sorted(glyphs.FONTS).index(split)))
    images, masks = np.empty((2, size, PIXELS, PIXELS), np.uint8)
    for row in tqdm(range(size), disable=None, leave=False, desc=f"rendering {split}"):
        images[row], masks[row] = scene(random, glyphs.FONTS[split])
    return {"images": torch.from_numpy(images), "masks": torch.from_numpy(masks)}


def scene(random: Generator, fonts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One image and its mask, both uint8 [48, 48]."""
    paper = random.uniform(0.1, 0.5)
    rows, columns = np.mgrid[:PIXELS, :PIXELS] / PIXELS - 0.5
    gray = paper + random.uniform(-0.15, 0.15) * rows + random.uniform(-0.15, 0.15) * columns
    mask = np.zeros((PIXELS, PIXELS), np.uint8)
    ink = np.zeros_like(gray)
    for _ in range(random.integers(0, 3)):
        gray += (random.uniform(paper + 0.3, 1) - gray) * _in_scene(glyphs._line(random), random)
    for _ in range(random.integers(3, 8)):
        digit = int(random.integers(len(string.digits)))
        drawn = glyphs._placed(random, fonts, string.digits[digit], offset=np.zeros(2))
        coverage = _in_scene(drawn, random)
        if (ink * coverage).any():
            continue  # the place is taken
        ink += coverage
        gray += (random.uniform(paper + 0.3, 1) - gray) * coverage
        mask[coverage > 0.5] = digit + 1
    gray += random.uniform(0, 0.08) * random.standard_normal(gray.shape)
    return (255 * gray.clip(0, 1)).round().astype(np.uint8), mask


def _in_scene(patch: np.ndarray, random: Generator) -> np.ndarray:
    """`patch`, [32, 32], at a random place in a scene, [48, 48], cropped at its edges."""
    padded = np.zeros((PIXELS + 2 * _MARGIN,) * 2)
    top, left = random.integers(0, PIXELS + 2 * _MARGIN - glyphs.PIXELS + 1, 2)
    padded[top : top + glyphs.PIXELS, left : left + glyphs.PIXELS] = patch
    return padded[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
