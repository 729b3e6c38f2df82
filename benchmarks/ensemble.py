"""Several networks that train at once, as one network with a group for each.

With small batches most time is call overhead of operators, which these networks share.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler

MOMENTUM = 0.9
WARM_UP = 0.05  # share of the steps in which the learning rate rises; then it falls to 0 along a cosine


class Block(nn.Module):
    """Pre-activation residual block: BatchNorm, ReLU and convolution twice, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, groups=groups, bias=False)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class Ensemble(nn.Module):
    """Independent pre-activation ResNets side by side: images [N, members, H, W] to logits [N, members, K].

    Every tensor has its channels ordered by member, so that one network is a slice of each parameter.
    A BatchNorm or InstanceNorm of all channels treats members apart as it is; a GroupNorm needs
    ``members`` times the groups of one. Source: He et al., "Identity Mappings in Deep Residual Networks".
    """

    def __init__(
        self, members: int, *, widths: Sequence[int], blocks: int, stem_stride: int, classes: int
    ) -> None:
        super().__init__()
        self.classes = classes
        inputs = members * widths[0]
        self.stem = nn.Conv2d(members, inputs, 3, stem_stride, padding=1, groups=members, bias=False)
        body = []
        for stage, index in itertools.product(range(len(widths)), range(blocks)):
            stride = 2 if stage > 0 and index == 0 else 1
            body.append(Block(inputs, members * widths[stage], stride, members))
            inputs = members * widths[stage]
        self.blocks = nn.Sequential(*body)
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(inputs, members * classes, 1, groups=members)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.blocks(self.stem(x)))))
        return self.head(x).reshape(x.shape[0], -1, self.classes)


class MemberSGD:
    """``torch.optim.SGD`` with momentum, with a separate learning rate for each member of an ensemble.

    Parameters and gradients become parts of two flat tensors: a step is a few operators on those.
    """

    def __init__(self, network: nn.Module, rates: Sequence[float], weight_decay: float) -> None:
        groups = pn_compiler.param_groups(network, weight_decay)
        parameters = [(p, group["weight_decay"]) for group in groups for p in group["params"]]
        self.values = torch.cat([p.detach().flatten() for p, _ in parameters])
        self.gradients, self.momentum = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.decay = torch.cat([torch.full_like(p, decay).detach().flatten() for p, decay in parameters])
        per_member = torch.tensor(rates, dtype=self.values.dtype, device=self.values.device)
        self.rates = torch.cat([per_member.repeat_interleave(p.numel() // len(rates)) for p, _ in parameters])
        sizes = [p.numel() for p, _ in parameters]
        parts = zip(parameters, self.values.split(sizes), self.gradients.split(sizes), strict=True)
        for (parameter, _), value, gradient in parts:
            parameter.data, parameter.grad = value.view_as(parameter), gradient.view_as(parameter)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Takes a step at `factor` times the learning rates, and sets the gradients to 0."""
        self.gradients.addcmul_(self.values, self.decay)
        self.momentum.mul_(MOMENTUM).add_(self.gradients)
        self.values.addcmul_(self.momentum, self.rates, value=-factor)
        self.gradients.zero_()


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: a linear rise, then a cosine to 0."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def train(
    network: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    seeds: Sequence[int],
    rates: Sequence[float],
    batch_size: int,
    epochs: int,
    weight_decay: float,
) -> None:
    """Trains each member on the same samples, in an order that its seed decides."""
    images, labels = data
    steps = len(images) // batch_size
    optimizer = MemberSGD(network, rates, weight_decay)
    generators = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
    network.train()
    for epoch in range(epochs):
        orders = {seed: torch.randperm(len(images), generator=g) for seed, g in generators.items()}
        order = torch.stack([orders[seed] for seed in seeds], 1).to(images.device)  # [samples, members]
        for step, rows in enumerate(order[: steps * batch_size].split(batch_size), epoch * steps):
            logits = network(images[rows])
            # summed over members: each has the gradient of its own mean
            loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), reduction="sum")
            (loss / batch_size).backward()
            optimizer.step(schedule(step, epochs * steps))
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: tuple[Tensor, Tensor], members: int) -> list[float]:
    """Accuracy of each member in percent."""
    right = torch.zeros(members)
    for images, labels in zip(*(part.split(128) for part in data), strict=True):
        logits = network(images.unsqueeze(1).expand(-1, members, -1, -1))
        right += (logits.argmax(2) == labels[:, None]).sum(0).cpu()
    return (100 * right / len(data[1])).tolist()
