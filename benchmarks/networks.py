"""Small BatchNorm networks of four families, as plain modules: what `benchmarks.trained` trains.

Three of them classify 32x32 gray images, one segments. Every convolution has a BatchNorm behind it and no
bias, but for the last layer and the gates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> nn.Sequential:
    """Convolution, BatchNorm and, if given, an activation; the sides of the output are 1/stride as long."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


class BasicBlock(nn.Module):
    """Post-activation residual block of two convolutions; a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, stride=stride, activation=nn.ReLU)
        self.second = conv_norm(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.first(x)) + self.shortcut(x))


def resnet20(classes: int) -> nn.Sequential:
    """ResNet-20 of CIFAR, 16-32-64 channels, with a stride of 2 at first: [N, 1, 32, 32] to [N, classes].

    Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385).
    """
    blocks = [
        BasicBlock(inputs if index == 0 else outputs, outputs, stride if index == 0 else 1)
        for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        for index in range(3)
    ]
    return nn.Sequential(conv_norm(1, 16, stride=2, activation=nn.ReLU), *blocks, *_classifier(64, classes))


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate from 0 to 1 that is computed from the means of all channels."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.SiLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and linear projection, with a shortcut where the shape stays.

    Source: Sandler et al., MobileNetV2 (arXiv 1801.04381); with a squeeze-and-excitation gate behind the
    depthwise convolution, the MBConv of Tan & Le, EfficientNet (arXiv 1905.11946).
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, *, activation: type[nn.Module], gate: bool
    ) -> None:
        super().__init__()
        wide = 4 * inputs
        self.branch = nn.Sequential(
            conv_norm(inputs, wide, 1, activation=activation),
            conv_norm(wide, wide, kernel, stride, groups=wide, activation=activation),
            SqueezeExcitation(wide, max(4, inputs // 4)) if gate else nn.Identity(),
            conv_norm(wide, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.residual else self.branch(x)


def mobilenet(classes: int) -> nn.Sequential:
    """A small MobileNetV2, ReLU6: [N, 1, 32, 32] to [N, classes]."""
    return _mobile(classes, kernels=(3, 3, 3), activation=nn.ReLU6, gate=False)


def efficientnet(classes: int) -> nn.Sequential:
    """A small EfficientNet, SiLU and squeeze-and-excitation: [N, 1, 32, 32] to [N, classes]."""
    return _mobile(classes, kernels=(3, 5, 3), activation=nn.SiLU, gate=True)


def _mobile(
    classes: int, kernels: Sequence[int], activation: type[nn.Module], *, gate: bool
) -> nn.Sequential:
    """Three stages of 16, 32 and 64 channels, two inverted residuals each."""
    shapes = zip((16, 16, 32), (16, 32, 64), kernels, (1, 2, 2), strict=True)
    blocks = [
        InvertedResidual(
            inputs if index == 0 else outputs, outputs, kernel, stride if index == 0 else 1,
            activation=activation, gate=gate,
        )
        for inputs, outputs, kernel, stride in shapes
        for index in range(2)
    ]  # fmt: skip
    return nn.Sequential(
        conv_norm(1, 16, stride=2, activation=activation),
        *blocks,
        conv_norm(64, 256, 1, activation=activation),
        *_classifier(256, classes),
    )


def _classifier(channels: int, classes: int) -> tuple[nn.Module, ...]:
    """Mean over space and a linear layer."""
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)


class UNet(nn.Module):
    """Segmentation: [N, 1, H, W] to [N, classes, H, W]; H and W are multiples of 8.

    Source: Ronneberger et al., U-Net (arXiv 1505.04597), with BatchNorm, padding and nearest upsampling.
    """

    def __init__(self, classes: int, widths: Sequence[int] = (16, 32, 64, 64)) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(_double, (1, *widths), widths))
        self.pool = nn.MaxPool2d(2)
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # deepest first
        self.widen = nn.Upsample(scale_factor=2)
        self.up = nn.ModuleList(_double(inputs + outputs, outputs) for inputs, outputs in pairs)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for index, block in enumerate(self.down):
            x = block(self.pool(x) if index else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([skip, self.widen(x)], 1))
        return self.head(x)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        conv_norm(inputs, outputs, activation=nn.ReLU), conv_norm(outputs, outputs, activation=nn.ReLU)
    )
