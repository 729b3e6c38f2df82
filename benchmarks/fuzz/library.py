"""Modules and functions of the kinds that users write themselves, for the generated networks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ABN",
    "Block",
    "ConvNormAct",
    "FusedNormAct",
    "GatedUnit",
    "Guarded",
    "OwnNorm",
    "RenormConv",
    "Scale",
    "ShuffleUnit",
    "SqueezeExcite",
    "Swish",
    "Tied",
    "swish",
]


class ABN(nn.Module):
    """Functional batch norm with parameters and buffers of its own, and the activation behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return F.leaky_relu(y, 0.01)


class Block(nn.Module):
    """A residual block of two convolutions with one ReLU for both."""

    def __init__(self, channels: int, conv: type[nn.Module], norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, channels, 3, padding=1, bias=False), norm(channels)
        self.conv2, self.bn2 = conv(channels, channels, 3, padding=1, bias=False), norm(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ConvNormAct(nn.Sequential):
    """torchvision's way: a Sequential with a name."""

    def __init__(self, conv: nn.Module, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__(conv, norm, activation)


class FusedNormAct(nn.BatchNorm2d):
    """timm's way: a BatchNorm that holds its activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class GatedUnit(nn.Module):
    """x * sigmoid(1x1 convolution of x)."""

    def __init__(self, channels: int, conv: type[nn.Module]) -> None:
        super().__init__()
        self.gate = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x))


class Guarded(nn.Module):
    """Branches on values, so that it cannot be traced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() < 1e30 else x


class OwnNorm(nn.BatchNorm2d):
    """A subclass that calls super().forward and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class RenormConv(nn.Conv2d):
    """EEGNet's convolution, whose weights are limited in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


class Scale(nn.Module):
    """LayerScale: one learnable factor per channel."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, channels).view(-1, *[1] * rank))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ShuffleUnit(nn.Module):
    """Half of the channels pass, half go through a branch; then a channel shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        out = torch.cat((kept, self.branch(changed)), dim=1)
        n, c, h, w = out.size()
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


class SqueezeExcite(nn.Module):
    """A gate for each channel from its mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(gate))))


class Tied(nn.Module):
    """Two layers of one weight, each with a BatchNorm of its own."""

    def __init__(self, first: nn.Module, second: nn.Module, norm: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.other = first, second, norm, other
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(F.relu(self.norm(self.first(x)))))


class _SwishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * (s + x * s * (1 - s))


class Swish(nn.Module):
    """EfficientNet-PyTorch's memory-efficient swish."""

    def forward(self, x: Tensor) -> Tensor:
        return _SwishFunction.apply(x)


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()
