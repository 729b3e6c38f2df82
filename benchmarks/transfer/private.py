"""Fine-tuning with differential privacy, by opacus."""

import warnings

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.ensemble import MOMENTUM
from benchmarks.transfer.data import Part
from pn_compiler.integrations.opacus import prepare, release

EPSILON, DELTA = 8.0, 1e-4
EPOCHS = 5
CLIP = 1.0  # the largest norm of a sample's gradient


def fine_tune_privately(
    network: nn.Module, head: str, images: Part, *, batch_size: int, learning_rate: float, seed: int
) -> bool:
    """SGD with momentum on clipped, noisy gradients, which spends epsilon in full.

    Only the head, and the parameters with one axis, those of the normalizers, are trained: noise grows
    with the number of parameters, and the kernels have far more.

    Args:
        network: is trained in place.
        head: path of its last layer.
        images: to train with.
        batch_size: images in a step, on average.
        seed: of what is sampled, and of the noise.

    Returns:
        Whether all losses were finite; it stops at the first that is not.
    """
    _train_few(network, head)
    torch.manual_seed(seed)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus': a random generator for experiments, hooks on a first layer
        private, optimizer, loader = PrivacyEngine(accountant="rdp").make_private_with_epsilon(
            module=prepare(network.train()),
            optimizer=torch.optim.SGD(learning, learning_rate, MOMENTUM),
            data_loader=DataLoader(TensorDataset(*images), batch_size),
            target_epsilon=EPSILON,
            target_delta=DELTA,
            epochs=EPOCHS,
            max_grad_norm=CLIP,
        )
        finite = all(_step(private, optimizer, batch) for _ in range(EPOCHS) for batch in loader)
    release(private)
    return finite


def _train_few(network: nn.Module, head: str) -> None:
    inside = set(network.get_submodule(head).parameters())
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.ndim <= 1 or parameter in inside)


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Part) -> bool:
    """Whether the loss is finite; that of a batch that sampling left empty is not, and changes nothing."""
    inputs, labels = batch
    loss = F.cross_entropy(network(inputs), labels)
    if len(labels) and not loss.isfinite():
        return False
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return True
