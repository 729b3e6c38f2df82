"""The user's own metric: budgets in its units, what it is called with, and states that it prefers."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError
from pn_compiler.testing import randomize_batch_norms

TOTAL = 48
IMAGES = torch.randn(TOTAL, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES += torch.linspace(-1, 1, TOTAL)[torch.randperm(TOTAL, generator=torch.Generator().manual_seed(1))][
    :, None, None, None
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    randomize_batch_norms(network)
    with torch.no_grad():
        for _ in range(40):
            network.train()(IMAGES)  # the statistics of the images
        network.eval()[-1].bias -= network(IMAGES).mean(0)  # so that there are several classes
    return network


@pytest.fixture(scope="module")
def converted(model: nn.Module) -> nn.Module:
    return pn_compiler.transform(model, norm="layer")


@pytest.fixture(scope="module")
def labels(converted: nn.Module) -> Tensor:
    """The converted network's own class, so that it is right on all."""
    with torch.no_grad():
        found = converted(IMAGES).argmax(1)
    assert len(found.unique()) > 2
    return found


def batches(labels: Any, size: int = 16) -> list[tuple[Tensor, Any]]:
    return list(zip(IMAGES.split(size), labels.split(size), strict=True))


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    return 100 * float((outputs.argmax(1) == labels).double().mean())


def held_out(share: float = 0.25) -> Tensor:
    return torch.randperm(TOTAL, generator=torch.Generator().manual_seed(0))[: round(share * TOTAL)]


def score(network: nn.Module, labels: Tensor, share: float = 0.25) -> float:
    rows = held_out(share)
    with torch.no_grad():
        return accuracy(network(IMAGES[rows]), labels[rows])


@pytest.mark.parametrize("budget", [0.0, 10.0, 20.0, None])
def test_a_budget_is_what_the_metric_may_lose(
    converted: nn.Module, labels: Tensor, budget: float | None
) -> None:
    frozen, report = pn_compiler.freeze_statistics(converted, batches(labels), budget=budget, metric=accuracy)
    assert report.metric == "accuracy"
    assert report.metric_before == score(converted, labels) == 100
    assert report.metric_after == score(frozen, labels)
    assert 100 - report.metric_after <= (math.inf if budget is None else budget)
    assert f"accuracy: 100 -> {report.metric_after:.6g}" in str(report)
    if budget is None:
        assert report.frozen == 4


def test_budgets_are_spent(converted: nn.Module, labels: Tensor) -> None:
    """The number of sites that are frozen depends on the metric's budget, and on nothing else."""

    def frozen(budget: float, metric: Callable[..., float]) -> int:
        return pn_compiler.freeze_statistics(converted, batches(labels), budget=budget, metric=metric)[
            1
        ].frozen

    counts = [frozen(budget, accuracy) for budget in (0.0, 20.0, 100.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 4
    assert frozen(0.0, lambda outputs, labels: 7.0) == 4  # nothing is lost, whatever the error
    assert frozen(0.2, lambda outputs, labels: accuracy(outputs, labels) / 100) == counts[1]


def test_the_metric_is_called_once_with_all_held_out_samples(converted: nn.Module, labels: Tensor) -> None:
    """So that it may be one that is no mean over batches."""
    seen: list[tuple[Tensor, Tensor]] = []

    def metric(outputs: Tensor, labels: Tensor) -> float:
        seen.append((outputs, labels))
        return 1.0

    pn_compiler.freeze_statistics(converted, batches(labels, 6), metric=metric, held_out=0.5)
    assert len(seen) == 2  # before, and with all sites frozen
    rows = held_out(0.5)
    with torch.no_grad():
        torch.testing.assert_close(seen[0][0], converted(IMAGES[rows]))
    assert torch.equal(seen[0][1], labels[rows])


@pytest.mark.parametrize(
    "form",
    [
        lambda y: y.numpy(),
        lambda y: y.tolist(),
        lambda y: [f"class {int(x)}" for x in y],
        lambda y: {"class": y, "twice": 2 * y},
        lambda y: [{"class": x} for x in y],
    ],
    ids=["array", "numbers", "texts", "dict", "a dict for each"],
)
def test_labels_follow_their_samples(converted: nn.Module, labels: Tensor, form: Callable[..., Any]) -> None:
    def metric(outputs: Tensor, given: Any) -> float:
        if isinstance(given, dict):
            assert torch.equal(given["twice"], 2 * given["class"])
            given = given["class"]
        if isinstance(given, list):
            entries = [x["class"] if isinstance(x, dict) else x.removeprefix("class ") for x in given]
            given = torch.tensor([int(x) for x in entries])
        return accuracy(outputs, given)

    pairs = [(images, form(part)) for images, part in batches(labels)]
    _, report = pn_compiler.freeze_statistics(converted, pairs, metric=metric)
    assert report.metric_before == 100


class Whole(nn.Module):
    """One output for a whole batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).mean(0)


def test_batches_that_cannot_be_split_come_as_lists(model: nn.Module, labels: Tensor) -> None:
    seen: list[tuple[Any, Any]] = []

    def metric(outputs: list[Tensor], given: list[Tensor]) -> float:
        seen.append((outputs, given))
        return float(sum(x.sum() for x in outputs))

    pairs = batches(labels, 8)
    _, report = pn_compiler.freeze_statistics(pn_compiler.transform(Whole(model)), pairs, metric=metric)
    outputs, given = seen[0]
    assert (report.unit, len(outputs)) == ("batches", report.held_out)
    assert [x.shape for x in outputs] == [torch.Size([5])] * len(outputs)
    for part in given:
        assert any(torch.equal(part, y) for _, y in pairs)


def test_such_batches_may_have_labels_of_any_kind(model: nn.Module, labels: Tensor) -> None:
    """One for a whole batch, whatever its size."""
    pairs = [(images, f"batch {number}") for number, (images, _) in enumerate(batches(labels, 8))]
    seen: list[tuple[Any, Any]] = []

    def metric(outputs: list[Tensor], given: list[str]) -> float:
        seen.append((outputs, given))
        return 0.0

    network = pn_compiler.transform(Whole(model))
    pn_compiler.freeze_statistics(network, pairs, metric=metric)
    for output, name in zip(*seen[0], strict=True):
        with torch.no_grad():
            torch.testing.assert_close(output, network(pairs[int(name.removeprefix("batch "))][0]))


@pytest.mark.parametrize(
    ("metric", "data", "message"),
    [
        (3, None, "metric=3: expected a function of outputs and labels, or package.module:function"),
        ("accuracy", None, "metric='accuracy': expected a function"),
        (nn.Linear, None, "metric=<class 'torch.nn.modules.linear.Linear'>: expected a function"),
        ("no.such:metric", None, "no.such:metric: "),
        ("math:pi", None, "math:pi is a float, not a metric"),
        (lambda outputs, labels: 1 / 0, None, "failed: ZeroDivisionError"),
        (lambda outputs, labels: outputs, None, "expected one number"),
        (lambda outputs, labels: "good", None, "returned 'good': expected one number"),
        (lambda outputs, labels: math.nan, None, " is nan before "),
        (accuracy, IMAGES, "batch 1 has no labels, which a metric needs"),
        (accuracy, [(IMAGES, torch.zeros(3))], "labels of batch 1 are not those of its 48 samples"),
        (accuracy, [(IMAGES, "labels")], "labels of batch 1 are not those of its 48 samples"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    model: nn.Module, converted: nn.Module, labels: Tensor, metric: Any, data: Any, message: str
) -> None:
    data = batches(labels) if data is None else data
    for function in (
        lambda: pn_compiler.freeze_statistics(converted, data, metric=metric),
        lambda: pn_compiler.distill(converted, model, data, steps=1, metric=metric),
    ):
        with pytest.raises(ConfigError) as raised:
            function()
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


def test_numbers_of_other_libraries_are_numbers(converted: nn.Module, labels: Tensor) -> None:
    for value in (torch.tensor(3), torch.tensor([[3.0]]), labels[:1].numpy() * 0 + 3, True + 2):
        _, report = pn_compiler.freeze_statistics(
            converted, batches(labels), metric=lambda outputs, labels, value=value: value
        )
        assert report.metric_after == 3.0
        assert type(report.metric_after) is float


# Distillation --------------------------------------------------------------------------------------


def test_the_metric_decides_which_state_is_kept(model: nn.Module, labels: Tensor) -> None:
    start = pn_compiler.transform(model, norm="instance")
    settings = {"steps": 50, "lr": 1e-3, "batch_size": 16}
    _, by_loss = pn_compiler.distill(start, model, batches(labels), **settings)
    assert by_loss.best_step > 0
    assert by_loss.metric_before is None
    calls: list[Tensor] = []

    def falling(outputs: Tensor, labels: Tensor) -> float:
        """The first state is the best."""
        calls.append(outputs)
        return -float(len(calls))

    student, report = pn_compiler.distill(start, model, batches(labels), metric=falling, **settings)
    assert (report.best_step, report.rollbacks, report.metric_before) == (0, 2, -1.0)
    assert report.metric_after == -1.0
    for name, value in start.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name
    calls.clear()
    _, report = pn_compiler.distill(
        start, model, batches(labels), metric=lambda outputs, labels: -falling(outputs, labels), **settings
    )
    assert (report.best_step, report.metric_before, report.metric_after) == (50, 1.0, 3.0)


def test_a_metric_that_is_equal_leaves_the_decision_to_the_loss(model: nn.Module, labels: Tensor) -> None:
    start = pn_compiler.transform(model, norm="instance")
    settings = {"steps": 50, "lr": 1e-3, "batch_size": 16}
    one, by_loss = pn_compiler.distill(start, model, batches(labels), **settings)
    other, report = pn_compiler.distill(
        start, model, batches(labels), metric=lambda outputs, labels: 0.0, **settings
    )
    assert (report.best_step, report.loss_after) == (by_loss.best_step, by_loss.loss_after)
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_distillation_never_loses_the_metric(model: nn.Module) -> None:
    """At a rate that ruins the network, with labels that are those of the teacher."""
    with torch.no_grad():
        labels = model(IMAGES).argmax(1)
    start = pn_compiler.transform(model, norm="instance")
    student, report = pn_compiler.distill(
        start, model, batches(labels), steps=50, lr=3.0, batch_size=16, metric=accuracy, held_out=0.5
    )
    rows = held_out(0.5)
    with torch.no_grad():
        before, after = (accuracy(net(IMAGES[rows]), labels[rows]) for net in (start, student))
    assert (report.metric_before, report.metric_after) == (before, after)
    assert after >= before
    assert f"accuracy {before:.6g} -> {after:.6g}" in str(report)


def test_a_checkpoint_remembers_the_metric(
    model: nn.Module, labels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_metrics.py").write_text(
        "def accuracy(outputs, labels): return (outputs.argmax(1) == labels).double().mean()\n"
        "def error(outputs, labels): return -(outputs.argmax(1) != labels).double().mean()\n"
    )
    start = pn_compiler.transform(model, norm="instance")

    def distilled(metric: Any) -> tuple[nn.Module, Any]:
        return pn_compiler.distill(
            start, model, batches(labels), steps=25, metric=metric, checkpoint=tmp_path / "state.pt"
        )

    one, report = distilled("own_metrics:accuracy")
    again, resumed = distilled("own_metrics:accuracy")
    assert report.metric == "own_metrics:accuracy"
    assert (resumed.metric_after, resumed.best_step) == (report.metric_after, report.best_step)
    for name, value in one.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(ConfigError, match=r"differs in .*metric"):
        distilled("own_metrics:error")
    assert "own_metrics" in sys.modules


def test_the_name_of_a_metric_is_that_of_the_user(converted: nn.Module, labels: Tensor) -> None:
    class Accuracy:
        def __call__(self, outputs: Tensor, labels: Tensor) -> float:
            return accuracy(outputs, labels)

    _, report = pn_compiler.freeze_statistics(converted, batches(labels), metric=Accuracy())
    assert report.metric == "Accuracy"


def test_compile_needs_a_use_for_the_metric(model: nn.Module, labels: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metric has no effect without distill_steps or static_statistics"):
        pn_compiler.compile(model, tmp_path / "m.onnx", calibration=batches(labels), metric=accuracy)


def test_compile_keeps_to_the_budget_of_the_metric(model: nn.Module, labels: Tensor, tmp_path: Path) -> None:
    report = pn_compiler.compile(
        model, tmp_path / "m.onnx", calibration=batches(labels), distill_steps=25,
        static_statistics="auto", error_budget=10.0, metric=accuracy,
    )  # fmt: skip
    assert report.static is not None
    assert report.distillation is not None
    assert report.static.metric_before is not None
    assert report.static.metric_after is not None
    assert report.static.metric_before - report.static.metric_after <= 10
    assert report.distillation.metric_before is not None
    assert report.distillation.metric_after is not None
    assert report.distillation.metric_after >= report.distillation.metric_before
