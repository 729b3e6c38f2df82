"""A network around any code, and what its conversion must compute."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.testing import randomize_batch_norms

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, a BatchNorm and an activation behind `before`, whatever that does."""

    def __init__(self, before: Callable[["Net", Any], Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.before = before

    def forward(self, x: Any) -> Tensor:
        return self.out(F.relu(self.bn(self.conv(self.before(self, x)))))


def make(before: Callable[[Net, Any], Any], *, nested: bool = False, train: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = Net(before)
    net = nn.Sequential(net, nn.Conv2d(3, 3, 1)) if nested else net
    return randomize_batch_norms(net).train(train)


def by_hand(net: nn.Module, converted: nn.Module) -> nn.Module:
    """`net` with the normalizers of `converted` in the place of its BatchNorms: no tracing."""
    net = copy.deepcopy(net)
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            net.set_submodule(path, copy.deepcopy(converted.get_submodule(path)))
    return net
