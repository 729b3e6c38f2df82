"""The new head is fitted before anything else is trained: a random one would spoil the features at first."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.real_networks.measure import outputs_of
from benchmarks.transfer.data import Part

PENALTY = 1.0  # half of it, times the squared weights, is added to the mean loss; features have deviation 1
STEPS = 100  # of L-BFGS, at most


def fit_head(network: nn.Module, head: str, images: Part) -> None:
    """Logistic regression on the features of a network in eval mode, whose other layers stay as they are.

    "Linear probing, then fine-tuning": Kumar et al., ICLR 2022 (arXiv 2202.10054).

    Args:
        network: ends in the head.
        head: path of an nn.Linear.
        images: to fit to.
    """
    inputs, labels = images
    layer = network.get_submodule(head)
    features = _features(network, layer, inputs)
    mean, deviation = features.mean(0), features.std(0, correction=0)
    deviation = deviation.where(deviation > 0, 1.0)  # a feature that is constant has no weight
    weight, bias = _logistic_regression((features - mean) / deviation, labels, len(layer.bias))
    with torch.no_grad():
        layer.weight.copy_(weight / deviation)
        layer.bias.copy_(bias - layer.weight @ mean)


def _features(network: nn.Module, layer: nn.Module, inputs: Tensor) -> Tensor:
    """What `layer` gets for each of the inputs, [N, F]."""
    found: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    try:
        outputs_of(network.eval(), inputs)
    finally:
        handle.remove()
    return torch.cat(found)


def _logistic_regression(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weights [K, F] and biases [K] with the least penalized loss; the biases have no penalty."""
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = PENALTY / 2 * weight.square().sum()
        total = F.cross_entropy(features @ weight.T + bias, labels) + penalty
        total.backward()
        return total

    optimizer.step(loss)
    return weight.detach(), bias.detach()
