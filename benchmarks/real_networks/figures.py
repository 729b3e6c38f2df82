"""How good a network's outputs are, and how close to those of the network with BatchNorm."""

import dataclasses
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from benchmarks.real_networks.networks import CENTS_PER_BIN, FIRST_CENTS
from pn_compiler.running.losses import divergence

TOLERANCE = 50.0  # cents: a quarter tone


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """Functions of outputs [N, K] of a network.

    Attributes:
        right: (outputs, labels) -> which are right [N].
        same: (outputs, those with BatchNorm) -> which say the same [N].
        divergence: of them from those with BatchNorm, in nats.
    """

    right: Callable[[Tensor, Tensor], Tensor]
    same: Callable[[Tensor, Tensor], Tensor]
    divergence: Callable[[Tensor, Tensor], float]


def pitch(logits: Tensor) -> Tensor:
    """The likeliest bin's pitch, in cents."""
    return FIRST_CENTS + CENTS_PER_BIN * logits.argmax(1)


def bernoulli(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of independent bins with logits [N, K], summed over K, mean over N."""
    p = teacher.sigmoid()
    cross = F.binary_cross_entropy_with_logits(student, p, reduction="sum")
    return (cross - F.binary_cross_entropy_with_logits(teacher, p, reduction="sum")) / len(teacher)


CLASSES = Figures(
    right=lambda logits, labels: logits.argmax(1) == labels,
    same=lambda logits, reference: logits.argmax(1) == reference.argmax(1),
    divergence=lambda logits, reference: float(divergence(logits.double(), reference.double()) or 0.0),
)
PITCHES = Figures(
    right=lambda logits, labels: (pitch(logits) - labels).abs() <= TOLERANCE,
    same=lambda logits, reference: (pitch(logits) - pitch(reference)).abs() <= TOLERANCE,
    divergence=lambda logits, reference: float(bernoulli(logits.double(), reference.double())),
)
