"""Private fine-tuning of a converted network whose head was replaced, against a loop over the samples."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pn_compiler
from pn_compiler.nn import INPUT_AFFINE, ProxyStatistics
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests import zoo

pytest.importorskip("opacus", reason="opacus is not installed")
from opacus import GradSampleModule, PrivacyEngine
from opacus.validators import ModuleValidator

from pn_compiler.integrations.opacus import prepare, release

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 6, 3, 3])


def sequential() -> nn.Module:
    """Its head absorbs the scale and shift of the site before it."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6),
        nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def replace_last(model: nn.Module) -> nn.Module:
    assert isinstance(model[8], tuple(INPUT_AFFINE.values()))
    model[8] = nn.Linear(6, 7)
    return model


def replace_fc(model: nn.Module) -> nn.Module:
    model.fc = nn.Linear(512, 7)
    return model


def replace_classifier(model: nn.Module) -> nn.Module:
    model.reset_classifier(7)
    return model


HEADS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "sequential": (sequential, replace_last),
    "torchvision": (lambda: zoo.torchvision().models.resnet18(num_classes=9), replace_fc),
    "timm": (lambda: zoo.timm().create_model("mobilenetv3_small_050"), replace_classifier),
}


def with_new_head(name: str) -> nn.Module:
    """A converted network in float64 with another head, which nothing has called yet."""
    build, replace = HEADS[name]
    torch.manual_seed(0)
    model = pn_compiler.transform(randomize_batch_norms(build()).eval(), X).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return replace(model).double()


def gradients_alone(model: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    """For each sample: its gradients from a forward and backward of it alone, without opacus."""
    for module in model.modules():
        if isinstance(module, ProxyStatistics):
            module.enabled = False  # together, sites share the nodes of a quadrature, off by 1e-10
    found = []
    for one, label in zip(x.split(1), LABELS.split(1), strict=True):
        model.zero_grad()
        F.cross_entropy(model(one), label).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return found


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_gradients_of_samples(name: str, called: bool) -> None:
    model, x = with_new_head(name), X.double()
    if called:
        model(x)
    expected = gradients_alone(copy.deepcopy(model), x)
    outputs = copy.deepcopy(model)(x)
    assert ModuleValidator.validate(prepare(model)) == []
    actual = GradSampleModule(model)(x)
    assert_same_outputs(actual, outputs, tolerance=1e-9)
    F.cross_entropy(actual, LABELS).backward()
    for sample, gradients in enumerate(expected):
        for path, gradient in gradients.items():
            error = model.get_parameter(path).grad_sample[sample] - gradient
            assert float(error.norm()) <= 1e-8 * float(gradient.norm().clamp_min(1e-9)), path


def test_one_private_step() -> None:
    """Without noise: the mean of the samples' gradients, each clipped to norm 0.1, times the rate."""
    model = with_new_head("sequential")
    x = X.double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected: dict[str, Tensor] = {name: torch.zeros_like(value) for name, value in before.items()}
    for gradients in gradients_alone(copy.deepcopy(model), x):
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        for name, gradient in gradients.items():
            expected[name] += gradient * min(1.0, 0.1 / float(norm)) / len(x)
    private, optimizer, loader = make_private(prepare(model), x)
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(private(images), labels).backward()
        optimizer.step()
    for name, parameter in release(private).named_parameters():
        torch.testing.assert_close(
            parameter.detach(), before[name] - 0.5 * expected[name], rtol=1e-5, atol=1e-9
        )
    model.eval()
    assert_same_outputs(pn_compiler.fold(model)(x), model(x), tolerance=1e-6)


def make_private(model: nn.Module, x: Tensor) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(TensorDataset(x, LABELS), batch_size=4),
        noise_multiplier=0.0, max_grad_norm=0.1, poisson_sampling=False,
    )  # fmt: skip
