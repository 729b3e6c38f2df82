"""anchor="auto": the least anchors with which a network keeps a budget."""

import math
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.config import TransformConfig
from pn_compiler.base.errors import ConfigError
from pn_compiler.nn import Normalizer
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests.test_anchors import Whole

TOTAL = 64
IMAGES = torch.randn(TOTAL, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES *= torch.linspace(0.4, 1.6, TOTAL)[torch.randperm(TOTAL, generator=torch.Generator().manual_seed(1))][
    :, None, None, None
]  # instances whose statistics differ
HELD_OUT = torch.randperm(TOTAL, generator=torch.Generator().manual_seed(0))[: TOTAL // 2]
BATCHES = list(IMAGES.split(16))


def network(*head: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, *(head or (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))))
    with torch.no_grad():
        for _ in range(40):
            model.train()(IMAGES)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = network()
    with torch.no_grad():
        model[-1].weight *= 4
        model[-1].bias -= model(IMAGES).mean(0)  # so that there are several classes
    return model


def anchors(converted: nn.Module) -> dict[str, float]:
    """Those that the table of sites states, which are those of the modules."""
    table = {site.name: site.anchor for site in pn_compiler.sites(converted)}
    for name, anchor in table.items():
        norm = converted.get_submodule(name)
        if isinstance(norm, Normalizer):
            assert torch.allclose(norm.anchor, torch.full_like(norm.anchor, anchor))
    return table


@torch.no_grad()
def divergence(student: Any, teacher: nn.Module) -> float:
    expected, actual = (net(IMAGES[HELD_OUT]).double().log_softmax(1) for net in (teacher, student))
    return float((expected.exp() * (expected - actual)).sum(1).mean())


@torch.no_grad()
def relative(student: nn.Module, teacher: nn.Module) -> float:
    expected, actual = teacher(IMAGES[HELD_OUT]), student(IMAGES[HELD_OUT])
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("options", [{"norm": "rms"}, {"norm": "rms", "num_groups": 2}], ids=str)
def test_budgets_of_the_divergence_are_kept_and_spent(model: nn.Module, options: dict[str, Any]) -> None:
    sums = []
    for budget in (0.003, 0.03, 1e3):
        converted = pn_compiler.transform(
            model, anchor="auto", anchor_budget=budget, calibration=BATCHES, **options
        )
        assert divergence(converted, model) <= budget + 1e-5
        sums.append(sum(anchors(converted).values()))
    assert sums[0] > sums[1] > sums[2] == 0


def test_each_site_gets_its_own_anchor_below_the_least_common_one(model: nn.Module) -> None:
    budget = 0.01
    found = anchors(
        pn_compiler.transform(model, norm="rms", anchor="auto", anchor_budget=budget, calibration=BATCHES)
    )
    common = next(
        b
        for b in (0, 0.25, 0.5, 0.75, 0.875, 1)
        if divergence(pn_compiler.transform(model, norm="rms", anchor=b), model) <= budget
    )
    assert common > 0
    assert sum(found.values()) <= 4 * common
    assert len(set(found.values())) > 1
    again = pn_compiler.transform(model, norm="rms", anchor=found)  # what was found can be given
    assert anchors(again) == found


def test_a_budget_of_0_is_the_network_as_it_was(model: nn.Module) -> None:
    converted = pn_compiler.transform(model, norm="rms", anchor="auto", anchor_budget=0, calibration=BATCHES)
    assert divergence(converted, model) < 2e-5


@pytest.mark.parametrize("budget", [0.01, 0.1])
def test_other_outputs_have_a_relative_error(budget: float) -> None:
    model = network(nn.Conv2d(16, 2, 1))
    converted = pn_compiler.transform(
        model, norm="rms", anchor="auto", anchor_budget=budget, calibration=BATCHES
    )
    assert relative(converted, model) <= budget + 1e-5
    assert 0 < sum(anchors(converted).values()) < 4


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    return 100 * float((outputs.argmax(1) == labels).double().mean())


def test_budgets_of_a_metric(model: nn.Module) -> None:
    with torch.no_grad():
        labels = model(IMAGES).argmax(1)
    assert len(labels.unique()) > 2
    batches = list(zip(BATCHES, labels.split(16), strict=True))
    seen = []
    for budget in (0.0, 10.0, 100.0):
        converted = pn_compiler.transform(
            model, norm="rms", anchor="auto", metric=accuracy, anchor_budget=budget, calibration=batches
        )
        with torch.no_grad():
            score = accuracy(converted(IMAGES[HELD_OUT]), labels[HELD_OUT])
        assert score >= 100 - budget
        seen.append(sum(anchors(converted).values()))
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > seen[-1] == 0


@pytest.mark.parametrize("options", [{"norm": "layer"}, {"norm": "group", "num_groups": 4}], ids=str)
def test_own_means_cannot_keep_every_budget(model: nn.Module, options: dict[str, Any]) -> None:
    converted = pn_compiler.transform(model, anchor="auto", anchor_budget=10, calibration=BATCHES, **options)
    assert not any(anchors(converted).values())
    with pytest.raises(ConfigError, match=r"even with an anchor of 1 .*anchor_budget.*norm='rms'"):
        pn_compiler.transform(model, anchor="auto", anchor_budget=1e-4, calibration=BATCHES, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor": "auto"}, r"anchor='auto' needs samples: give calibration="),
        ({"anchor": "auto", "calibration": []}, "batches is empty"),
        ({"anchor": "auto", "calibration": [IMAGES[:1]]}, "at least two are needed"),
        ({"anchor": "auto", "calibration": BATCHES, "metric": accuracy}, "no labels"),
        ({"anchor": "auto", "calibration": BATCHES, "anchor_budget": -1}, "anchor_budget"),
        ({"anchor": "auto", "calibration": BATCHES, "anchor_budget": math.nan}, "anchor_budget"),
        ({"anchor": 0.5, "anchor_budget": 0.1}, "anchor_budget has no effect"),
        ({"anchor": 0.5, "metric": accuracy}, "metric has no effect"),
        ({"anchor": "least"}, "anchor='least'"),
        ({"anchor": "auto", "calibration": BATCHES, "metric": "nothing"}, "metric"),
    ],
)
def test_impossible_options(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        pn_compiler.transform(model, norm="rms", **options)
    assert "\n" not in str(caught.value)


class Detector(nn.Module):
    """Outputs whose shape depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).flatten()
        return y[y > 0.3]


def test_outputs_of_any_shape_need_a_metric() -> None:
    torch.manual_seed(0)
    model = randomize_batch_norms(Detector()).eval()
    options: dict[str, Any] = {"norm": "rms", "anchor": "auto"}
    with pytest.raises(ConfigError, match="pass metric="):
        pn_compiler.transform(model, calibration=BATCHES, **options)

    def count(outputs: Any, labels: Any) -> float:
        return float(sum(len(y) for y in outputs))

    batches = [(x, torch.zeros(len(x))) for x in BATCHES]
    converted = pn_compiler.transform(model, calibration=batches, metric=count, anchor_budget=1e6, **options)
    assert anchors(converted) == {"bn": 0}


def test_sites_in_code_that_is_not_traced_have_anchors_too() -> None:
    torch.manual_seed(0)
    model = randomize_batch_norms(Whole()).eval()
    options: dict[str, Any] = {"norm": "rms", "leaves": ["part"]}
    budget = divergence(pn_compiler.transform(model, anchor=0.0, **options), model) / 10
    assert budget > 1e-4
    converted = pn_compiler.transform(
        model, anchor="auto", anchor_budget=budget, calibration=BATCHES, **options
    )
    found = anchors(converted)
    assert found.keys() == {"part.bn1", "part.bn2", "bn3"}
    assert 0 < sum(found.values()) < 3
    assert divergence(converted, model) <= budget + 1e-5


def test_one_value_is_kept_by_an_anchor_of_1() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1), nn.Linear(1, 8), nn.BatchNorm1d(8))
    model = randomize_batch_norms(model).eval()
    converted = pn_compiler.transform(
        model, norm="rms", anchor="auto", anchor_budget=1e3, calibration=[IMAGES[:, :, 0, 0]]
    )
    assert anchors(converted) == {"1": 1, "3": 0}
    assert all(site.kind != "skipped" for site in pn_compiler.sites(converted))


def test_the_model_and_random_numbers_stay_as_they_were(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    pn_compiler.transform(model.train(), norm="rms", anchor="auto", calibration=BATCHES[:2])
    assert torch.equal(torch.rand(1), expected)
    assert all(module.training for module in model.modules())
    model.eval()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_with_a_calibrated_start(model: nn.Module) -> None:
    options: dict[str, Any] = {"norm": "rms", "calibration": BATCHES}
    plain = pn_compiler.transform(model, anchor="auto", **options)
    fitted = pn_compiler.transform(model, anchor="auto", warm_start="calibrate", **options)
    assert anchors(fitted) == anchors(plain)
    again = pn_compiler.transform(model, anchor=anchors(plain), warm_start="calibrate", **options)
    with torch.no_grad():
        assert_same_outputs(fitted(IMAGES), again(IMAGES))


def test_compile_writes_the_network_that_keeps_the_budget(model: nn.Module, tmp_path: Path) -> None:
    report = pn_compiler.compile(
        model, tmp_path / "m.onnx", IMAGES[:1], norm="rms", anchor="auto", calibration=BATCHES
    )
    assert any(0 < site.anchor < 1 for site in report.sites)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (actual,) = session.run(None, {session.get_inputs()[0].name: IMAGES[HELD_OUT].numpy()})

    def stored(x: Tensor) -> Tensor:
        return torch.from_numpy(actual)

    assert divergence(stored, model) <= TransformConfig.anchor_budget + 1e-4


def test_compile_needs_samples(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="anchor='auto' needs samples: give calibration="):
        pn_compiler.compile(model, tmp_path / "m.onnx", IMAGES[:1], norm="rms", anchor="auto")
