"""Private fine-tuning with opacus: a converted network against ModuleValidator.fix, on scikit-learn's digits.

A network with BatchNorm is trained on 400 public images. It is then made ready for opacus in two ways, and
trained on 857 private images, epsilon 3. Run it with ``python examples/private_digits.py``.
"""

import copy
import logging
import statistics
import warnings
from collections.abc import Callable

import torch
from digits import load_data, train
from digits_network import DigitsNet
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import pn_compiler
from pn_compiler.integrations.opacus import prepare, release

PUBLIC = 400
EPSILON, DELTA = 3.0, 1e-4
EPOCHS, BATCH = 5, 128
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03)
SEEDS = 3


def fix(model: nn.Module) -> nn.Module:
    """What opacus offers: a new GroupNorm in the place of each BatchNorm."""
    model = ModuleValidator.fix(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # opacus' hooks refuse it
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ModuleValidator.fix": fix,
    "transform": lambda model: prepare(pn_compiler.transform(model, norm="layer")),
    "transform, no proxy norm": lambda model: prepare(
        pn_compiler.transform(model, norm="layer", proxy=False)
    ),
}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent."""
    return 100 * float((model.eval()(images).argmax(1) == labels).double().mean())


def train_privately(model: nn.Module, images: Tensor, labels: Tensor, *, lr: float) -> nn.Module:
    """SGD with momentum on clipped, noisy gradients, epsilon spent in full."""
    model.train()
    private, optimizer, loader = PrivacyEngine(accountant="rdp").make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr, momentum=0.9),
        data_loader=DataLoader(TensorDataset(images, labels), BATCH),
        target_epsilon=EPSILON,
        target_delta=DELTA,
        epochs=EPOCHS,
        max_grad_norm=1.0,
    )
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(x), y).backward()
            optimizer.step()
    return release(private)


def main() -> None:
    warnings.simplefilter("ignore")  # opacus': a random generator for experiments, hooks on a first layer
    logging.disable(logging.INFO)
    torch.manual_seed(0)
    images, labels, *test = load_data()
    network = DigitsNet()
    train(network, images[:PUBLIC], labels[:PUBLIC], epochs=40, lr=3e-3)
    images, labels = images[PUBLIC:], labels[PUBLIC:]
    print(f"BatchNorm, trained on {PUBLIC} public images: {accuracy(network, *test):.1f} %")

    print(f"\n{'made ready by':<26}{'at once':>9}   at epsilon {EPSILON:g}, mean (sd) of {SEEDS} runs")
    print(f"{'learning rate':>37} " + "".join(f"{lr:>14g}" for lr in LEARNING_RATES))
    bar = tqdm(total=len(WAYS) * len(LEARNING_RATES) * SEEDS, disable=None, leave=False)
    for name, way in WAYS.items():
        start = way(network)
        at_once = accuracy(start, *test)
        cells = []
        for lr in LEARNING_RATES:
            results = []
            for seed in range(SEEDS):
                torch.manual_seed(seed)
                results.append(accuracy(train_privately(copy.deepcopy(start), images, labels, lr=lr), *test))
                bar.update()
            cells.append(f"{statistics.mean(results):.1f} ({statistics.stdev(results):.1f})")
        print(f"{name:<26}{at_once:>7.1f} %   " + "".join(f"{cell:>14}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
