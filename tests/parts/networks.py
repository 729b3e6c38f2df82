"""Networks for the tests of this folder: what users write, and public ones."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.testing import randomize_batch_norms
from tests import zoo

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Backbone(nn.Module):
    """Methods, properties and attributes beside forward; functions as activations."""

    family = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.stride, self.labels = 2, ["cat", "dog"]
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12), nn.SiLU()) for _ in range(2)
        )
        self.heads = nn.ModuleDict({"main": nn.Linear(12, 5)})
        self.unused = nn.Linear(12, 3)
        self.calls = 0

    @property
    def width(self) -> int:
        return self.conv1.out_channels

    def extract(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x)).relu()
        for block in self.blocks:
            x = block(x)
        return x

    def encode(self, x: Tensor, pool: bool = True) -> Tensor:
        x = self.extract(x)
        return x.mean((2, 3)) if pool else x

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self(x), labels)

    def count(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.bn1(self.conv1(x)))

    def unconverted(self, x: Tensor) -> Tensor:
        return self.unused(self.encode(x))

    def describe(self) -> str:
        return f"{type(self).__name__} {self.width} {self.labels[0]}"

    def forward(self, x: Tensor) -> Tensor:
        return self.heads["main"](self.encode(x))


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Classifier(nn.Module):
    """Built like torchvision's classifiers, out of containers only."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Hardswish()),
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU6()),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def network(name: str) -> nn.Module:
    """One of the above, one of torchvision, or one of timm ("timm/name"); eval mode, float64."""
    torch.manual_seed(0)
    own: dict[str, Callable[[], nn.Module]] = {
        "backbone": Backbone,
        "classifier": Classifier,
        "sequential": sequential,
        "resnet10": lambda: _resnet10(zoo.torchvision().models.resnet),
    }
    if name in own:
        found = own[name]()
    elif name.startswith("timm/"):
        found = zoo.timm().create_model(name.removeprefix("timm/"), num_classes=5)
    else:
        found = getattr(zoo.torchvision().models, name)(num_classes=5)
    return randomize_batch_norms(found).eval().double()


def _resnet10(resnet: Any) -> nn.Module:
    found: nn.Module = resnet.ResNet(resnet.BasicBlock, [1, 1, 2, 1], num_classes=5)
    return found


@functools.cache
def _converted(name: str) -> nn.Module:
    # two axes of "sequential" are only known with an example; the others are quicker without the comparison
    example = IMAGES.double() if name == "sequential" else None
    return pn_compiler.transform(network(name), example, norm="layer")


def converted(name: str) -> nn.Module:
    """The conversion of a `network`."""
    return copy.deepcopy(_converted(name))


def pickled(model: nn.Module) -> nn.Module:
    result: nn.Module = pickle.loads(pickle.dumps(model))
    return result


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "copied": copy.deepcopy,
    "pickled": pickled,
}
