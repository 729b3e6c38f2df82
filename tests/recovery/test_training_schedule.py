"""How fast a distillation learns, when it takes back what it learnt, and how it runs large batches."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler import distill, output_loss
from pn_compiler.recovery import trainer
from pn_compiler.recovery.eval_result import EvalResult
from pn_compiler.recovery.site_matching import SiteMatching
from pn_compiler.running.inputs import Inputs
from pn_compiler.testing import randomize_batch_norms


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    return randomize_batch_norms(net).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def rates(monkeypatch: pytest.MonkeyPatch, steps: int, lr: float = 1e-6, **options: float) -> list[float]:
    """The learning rate of each step."""
    found = []
    rate = trainer.Trainer._rate

    def noted(self: trainer.Trainer) -> float:
        found.append(rate(self))
        return found[-1]

    monkeypatch.setattr(trainer.Trainer, "_rate", noted)
    net = network()
    start = pn_compiler.transform(net, **{"norm": "layer", **options})
    distill(start, net, images(20), steps=steps, lr=lr, batch_size=16)
    return found


def initial_distance(student: nn.Module, net: nn.Module, x: Tensor) -> float:
    """Of the sites."""
    sites = SiteMatching(student.eval(), net)
    sites.observe_teacher(Inputs((x,)))
    with torch.no_grad(), sites.comparing():
        student(x)
    return float(sites.distance())


@pytest.mark.parametrize(("steps", "rises"), [(1, 1), (9, 1), (30, 3), (300, 20)])
def test_the_rate_rises_for_a_tenth_of_the_steps_and_then_falls(
    steps: int, rises: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rates(monkeypatch, steps)
    cosine = [1e-6 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    expected = [value * min(1, (step + 1) / rises) for step, value in enumerate(cosine)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_network_that_is_nearly_right_learns_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """In proportion to the distance of its sites."""
    net = network()
    shares = []
    for anchor in (0.5, 0.9, 1.0):
        found = rates(monkeypatch, 1, norm="rms", anchor=anchor)
        distance = initial_distance(pn_compiler.transform(net, norm="rms", anchor=anchor), net, images(20))
        assert found[0] == pytest.approx(1e-6 * min(1.0, distance / 0.1), rel=0.5, abs=1e-12)
        shares.append(found[0] / 1e-6)
    assert 1 >= shares[0] > 3 * shares[1] > 3 * shares[2]


def test_a_parameter_learns_in_proportion_to_its_size() -> None:
    """Adam's first step has the size of the learning rate."""
    net = network().double()
    with torch.no_grad():
        net[3].weight.mul_(50)  # the BatchNorm takes it back
        net[4].running_mean.mul_(50)
        net[4].running_var.mul_(2500)
        net[7].bias.zero_()
    start = pn_compiler.transform(net, norm="layer", proxy=False)
    student, report = distill(start, net, images(40).double(), steps=1, lr=1e-5)
    assert report.best_step == 1
    after = dict(student.named_parameters())
    for name, parameter in start.named_parameters():
        before = parameter.detach()
        size = float(before.square().mean().sqrt())
        expected = 1e-5 * max(size, 0.01 if before.ndim > 1 else 0.1) / 0.1
        moved = (after[name].detach() - before).abs()
        if float(moved.max()):  # the convolutions' biases: none of the normalizers lets them through
            assert float(moved.max()) == pytest.approx(expected, rel=1e-2), name
        assert name != "3.weight" or expected > 1e-4


HELD_OUT = [
    ([1.0, 1.3, 1.2, 0.8], 0),  # a little worse, and on its way back
    ([1.0, 1.3, 0.9, 1.3, 0.8], 0),  # once
    ([1.0, 1.3, 1.4, 0.8], 1),  # twice
    ([1.0, 2.1, 0.8], 1),  # far worse
    ([1.0, 0.9, 1.2, 1.2, 1.3], 1),  # the third time it still falls short
    ([-1.0, -0.5, -2.0], 0),
    ([-1.0, 0.5, -2.0], 1),
]


@pytest.mark.parametrize(("values", "rollbacks"), HELD_OUT, ids=str)
def test_when_it_rolls_back(values: Sequence[float], rollbacks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loss that is known in advance for the held-out samples, which decides."""
    monkeypatch.setattr(trainer, "EVALUATE_EVERY", 2)
    rest = list(values)

    def loss(student: Tensor, expected: Tensor) -> Tensor:
        own = output_loss(student, expected)
        return own if torch.is_grad_enabled() else own * 0 + rest.pop(0)

    net = network()
    _, report = distill(
        pn_compiler.transform(net, norm="layer"), net, images(20), steps=2 * len(values) - 2, loss=loss
    )
    assert rest == []
    assert report.rollbacks == rollbacks
    assert report.loss_after == pytest.approx(min(values))


def result(distance: float, watched: float = 0.0, metric: float | None = None) -> EvalResult:
    return EvalResult(0, distance, None, None, distance, watched, metric)


@pytest.mark.parametrize(
    ("actual", "previous", "start", "expected"),
    [
        (result(1.2), result(1.0), result(1.0), False),
        (result(1.2), result(1.1), result(1.0), True),
        (result(1.2), result(1.3), result(1.0), False),
        (result(2.1), result(1.0), result(1.0), True),
        (result(0.5, watched=2.1), result(1.0, 1.0), result(1.0, 1.0), True),  # it may hold logits
        (result(0.5, watched=1.2), result(1.0, 1.0), result(1.0, 1.0), False),
        (result(0.5, metric=0.8), result(1.0, metric=0.9), result(1.0, metric=0.9), True),
        (result(9.0, metric=0.9), result(1.0, metric=0.9), result(1.0, metric=0.9), False),
        (result(0.5, metric=math.nan), result(1.0, metric=0.9), result(1.0, metric=0.9), True),
    ],
)
def test_what_calls_for_a_rollback(
    actual: EvalResult, previous: EvalResult, start: EvalResult, expected: bool
) -> None:
    assert actual.calls_for_rollback(previous, start, by_loss=False) == expected


def test_after_a_rollback_the_rate_rises_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "EVALUATE_EVERY", 10)
    monkeypatch.setattr(trainer.EvalResult, "calls_for_rollback", lambda self, *_, **__: self.step == 10)
    monkeypatch.setattr(trainer.EvalResult, "better_than", lambda *_, **__: False)
    found = rates(monkeypatch, 40)
    cosine = [1e-6 * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    ratios = [actual / value for actual, value in zip(found, cosine, strict=True)]
    assert ratios[:10] == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 7])
    assert ratios[10:] == pytest.approx([0.0625, 0.125, 0.1875, *[0.25] * 27])


def test_large_images_run_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps are the same."""
    net = network().double()
    start = pn_compiler.transform(net, norm="rms", anchor=0.5)
    x = images(40).double()
    states, calls = [], []
    for piece in (2**20, x[0].numel() * 3):
        monkeypatch.setattr(trainer, "_PIECE", piece)
        sizes: list[int] = []
        loss_on = trainer.Trainer._loss_on
        monkeypatch.setattr(
            trainer.Trainer,
            "_loss_on",
            lambda self, rows, sizes=sizes, loss_on=loss_on: (sizes.append(len(rows)), loss_on(self, rows))[
                1
            ],
        )
        states.append(distill(start, net, x, steps=8, batch_size=8)[0].state_dict())
        monkeypatch.setattr(trainer.Trainer, "_loss_on", loss_on)
        calls.append(sizes)
    assert calls[0] == [8, *[8] * 8, 8]
    assert calls[1] == [8, *[3, 3, 2] * 8, 8]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-7, atol=1e-9)
