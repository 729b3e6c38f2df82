"""Real models for the tests: the one place that makes torchvision importable beside CPU torch."""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor, nn

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


def small(name: str) -> nn.Module:
    """A network of torchvision's blocks without their repetitions, which would only cost time."""
    models = torchvision().models
    network: nn.Module
    if name == "resnet":
        network = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    elif name == "mobilenet":
        network = models.MobileNetV2(10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]])
    elif name == "efficientnet":
        block = models.efficientnet.MBConvConfig
        setting = [block(1, 3, 1, 32, 16, 1, 1, 1), block(6, 5, 2, 16, 24, 2, 1, 1)]
        network = models.efficientnet.EfficientNet(setting, 0.2, num_classes=10)
    else:
        raise ValueError(name)
    return network
