"""Real models for the tests: the one place that makes torchvision importable beside CPU torch."""

import functools
from types import ModuleType

import torch


@functools.cache
def torchvision() -> ModuleType:
    """torchvision, whose compiled operators have no CPU build here: their schemas are enough to import it."""
    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    import torchvision

    return torchvision


@functools.cache
def timm() -> ModuleType:
    """timm, which imports torchvision."""
    torchvision()
    import timm

    return timm
