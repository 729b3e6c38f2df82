"""One training step of a converted real network, for the tests of training."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler.nn import ProxyNormAct
from pn_compiler.testing import randomize_batch_norms
from tests import zoo

Gradients = dict[str, Tensor]

#: without dropout and stochastic depth: two forwards compute the same
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: zoo.torchvision().models.resnet18(num_classes=10),
    "mobilenet_v2": lambda: zoo.torchvision().models.mobilenet_v2(num_classes=10, dropout=0.0),
    "efficientnet_b0": lambda: zoo.torchvision().models.efficientnet_b0(
        num_classes=10, dropout=0.0, stochastic_depth_prob=0.0
    ),
    "test_resnet": lambda: zoo.timm().create_model("test_resnet", num_classes=10),
    "test_efficientnet": lambda: zoo.timm().create_model("test_efficientnet", num_classes=10),
}
THREE = ("resnet18", "mobilenet_v2", "efficientnet_b0")
TINY = ("test_resnet", "test_efficientnet")
BLOCKS = ("BasicBlock", "InvertedResidual")  # none begins with the consumer of a site


def network(name: str, **options: Any) -> nn.Module:
    """A copy of the network as it is converted, once, with these options."""
    return copy.deepcopy(_converted(name, **options))


@functools.cache
def _converted(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return pn_compiler.transform(randomize_batch_norms(NETWORKS[name]()), **options).train()


def by_blocks(name: str) -> tuple[nn.Module, list[str]]:
    """The network converted block by block, so that its blocks are still modules; and their paths."""
    return copy.deepcopy(_converted_by_blocks(name))


@functools.cache
def _converted_by_blocks(name: str) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(0)
    net = randomize_batch_norms(NETWORKS[name]())
    blocks = [path for path, module in net.named_modules() if type(module).__name__ in BLOCKS]
    for path in blocks:
        net.set_submodule(path, pn_compiler.transform(net.get_submodule(path)))
    return pn_compiler.transform(net, leaves=blocks).train(), blocks


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def sites(model: nn.Module) -> dict[str, ProxyNormAct]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ProxyNormAct)}


def loss_of(logits: Tensor) -> Tensor:
    """Mean over the samples of a linear function of the logits."""
    direction = torch.arange(logits.shape[1]).cos().to(logits.dtype)
    return (logits * direction).sum() / len(logits)


def step(
    model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Gradients]:
    """Outputs, and the gradients of all parameters; every parameter must have one."""
    model.zero_grad()
    out = model(x) if call is None else call(x)
    loss_of(out).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    return out.detach(), gradients


def distance(actual: Gradients, expected: Gradients) -> float:
    """Norm of the difference of two gradients, relative to the norm of the second."""
    assert actual.keys() == expected.keys()
    pairs = [(actual[name].detach().double(), wanted.detach().double()) for name, wanted in expected.items()]
    difference = sum(float((one - other).square().sum()) for one, other in pairs)
    return math.sqrt(difference / sum(float(wanted.square().sum()) for _, wanted in pairs))
