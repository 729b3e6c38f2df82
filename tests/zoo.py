"""Real models for the tests: the one place that makes torchvision importable beside CPU torch."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from pn_compiler.loading.admission import prepare_torchvision


@functools.cache
def torchvision() -> ModuleType:
    """torchvision, whose compiled operators may not match torch.

    Their schemas are enough to import it; those that detectors call are given in PyTorch.
    """
    prepare_torchvision()
    import torchvision

    if torchvision.extension._has_ops():
        return torchvision
    torch.library.impl("torchvision::nms", "CPU", _nms)
    box_operators = importlib.import_module("torchvision.ops.boxes")
    box_operators._assert_has_ops = lambda: None  # type: ignore[attr-defined]
    pooling = importlib.import_module("torchvision.ops.roi_align")
    pooling._roi_align = pooling._roi_align.__wrapped__  # type: ignore[attr-defined]  # not compiled
    return torchvision


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes [N, 4] that no better box overlaps by more than `iou_threshold`, best first."""
    from torchvision.ops import box_iou

    order = scores.argsort(descending=True, stable=True)
    overlaps = box_iou(boxes[order], boxes[order]) > iou_threshold
    kept = torch.ones(len(order), dtype=torch.bool)
    for index in range(len(order)):
        if kept[index]:
            kept[index + 1 :] &= ~overlaps[index, index + 1 :]
    return order[kept]


@functools.cache
def timm() -> ModuleType:
    """timm, which imports torchvision."""
    torchvision()
    import timm

    return timm
