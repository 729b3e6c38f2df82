"""The reader's own files that pages speak of, made in the current folder: small networks, images, arrays."""

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from examples.digits_network import DigitsNet
from pn_compiler.testing import randomize_batch_norms
from tests import zoo


def network(channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2)]
    head = [nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    return randomize_batch_norms(nn.Sequential(*layers, *head)).eval()


def images(folder: Path) -> None:
    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(64):
        pixels = draw.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).resize((280, 280)).save(folder / f"{index}.png")


MY_NETWORKS = """
import torch
from torch import nn


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 8)
        self.conv, self.bn = nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)

    def forward(self, tokens, mask):
        x = self.embedding(tokens).masked_fill(mask.unsqueeze(2), 0)
        return self.bn(self.conv(x.transpose(1, 2))).relu().amax(2)


class Stereo(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)

    def forward(self, left, right):
        return self.head(self.bn(self.conv(torch.cat([left, right], 1))).relu())
"""


def save_mine(path: Path) -> None:
    """A network of the class in my_networks.py that is called as the file."""
    my_networks = importlib.import_module("my_networks")
    torch.save(getattr(my_networks, path.stem.capitalize())().eval(), path)


def save_checkpoint(path: Path) -> None:
    """Of Lightning, in part."""
    weights = zoo.torchvision().models.resnet18().state_dict()
    state = {f"model.{name}": value for name, value in weights.items()}
    torch.save({"epoch": 3, "state_dict": state, "lr_schedulers": []}, path)


def save_detector(path: Path) -> None:
    detection = zoo.torchvision().models.detection
    torch.save(detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None), path)


def demo_output(folder: Path) -> None:
    """What a page needs of ``make demo``, untrained."""
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(DigitsNet().state_dict(), folder / "model.pt")


def weights_of_resnet50(_: Path) -> None:
    """In the place of the download, in torch's own cache: untrained ones."""
    torch.manual_seed(0)
    file = Path(torch.hub.get_dir()) / "checkpoints" / "resnet50-11ad3fa6.pth"
    file.parent.mkdir(parents=True)
    torch.save(zoo.torchvision().models.resnet50().state_dict(), file)


GIVEN: dict[str, Callable[[Path], object]] = {
    "model.pt": lambda path: torch.save(network(), path),
    "net.pt": lambda path: torch.save(network(), path),
    "last.ckpt": save_checkpoint,
    "my_networks.py": lambda path: path.write_text(MY_NETWORKS),
    "text.pt": save_mine,
    "stereo.pt": save_mine,
    "detector.pt": save_detector,
    "demo_output": demo_output,
    "images/": images,
    "resnet50-weights": weights_of_resnet50,
    "samples.npy": lambda path: np.save(path, np.random.default_rng(0).random((64, 3, 32, 32), np.float32)),
}
