"""A short training towards a teacher: what it learns, what it leaves alone, and how it goes on."""

import copy
import dataclasses
import io
import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pn_compiler
from pn_compiler import DistillReport, distill, output_loss, relative_l2
from pn_compiler.base.errors import ConfigError, ExportError, LoadError
from pn_compiler.data import samples
from pn_compiler.recovery import trainer
from pn_compiler.running import losses
from pn_compiler.running.inputs import Inputs
from pn_compiler.testing import randomize_batch_norms
from tests import killed
from tests.training_step import NETWORKS, TINY
from tests.training_step import images as pictures

State = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For networks so small, two take longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """1,797 digits."""
    return torch.tensor(load_digits().images / 16, dtype=torch.float32).unsqueeze(1)


@pytest.fixture(scope="module")
def teacher(images: Tensor) -> nn.Module:
    """A small residual-free network with BatchNorm, trained to some 95 % in two seconds."""
    torch.manual_seed(0)
    labels = torch.tensor(load_digits().target)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 24, 3, 2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(96, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for rows in torch.randperm(1280).repeat(2).split(32):
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.eval()


@pytest.fixture(scope="module")
def converted(teacher: nn.Module) -> nn.Module:
    return pn_compiler.transform(teacher, norm="instance")


def tiny() -> nn.Module:
    """Images [N, 1, 8, 8] to [N, 3], with BatchNorm."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return randomize_batch_norms(net).eval()


def state_of(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_seconds(report: DistillReport) -> DistillReport:
    return dataclasses.replace(report, seconds=0.0)


# What it learns ------------------------------------------------------------------------------------


def test_the_student_comes_near_its_teacher(teacher: nn.Module, converted: nn.Module, images: Tensor) -> None:
    student, report = distill(converted, teacher, images[:1280].split(32), steps=60, lr=2e-3)
    assert (report.training, report.held_out, report.unit) == (1024, 256, "samples")
    assert report.steps == 60 >= report.best_step > 0
    assert report.loss_after < 0.6 * report.loss_before
    assert report.agreement_before is not None
    assert report.agreement_after is not None
    assert report.agreement_after >= report.agreement_before
    assert report.stopped == ""
    unseen = images[1280:]
    with torch.no_grad():
        expected = teacher(unseen)
        before, after = (
            float(output_loss(net(unseen), expected)) for net in (converted.eval(), student.eval())
        )
    assert after < 0.7 * before
    assert pn_compiler.sites(student) == pn_compiler.sites(converted)


def test_all_but_the_copy_is_left_alone(images: Tensor, teacher: nn.Module, converted: nn.Module) -> None:
    converted.train()
    converted.get_submodule("1").eval()
    before = [state_of(net) for net in (converted, teacher)]
    modes = [[m.training for m in net.modules()] for net in (converted, teacher)]
    random = torch.get_rng_state()
    student, _ = distill(converted, teacher, images[:64], steps=3)
    assert torch.equal(torch.get_rng_state(), random)
    for net, state, training in zip((converted, teacher), before, modes, strict=True):
        assert same(state_of(net), state)
        assert [m.training for m in net.modules()] == training
        assert all(p.grad is None for p in net.parameters())
    assert [m.training for m in student.modules()] == modes[0]
    assert not same(state_of(student), before[0])
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    converted.train()


def test_dropout_and_running_statistics_do_not_take_part(images: Tensor) -> None:
    """Else two students would differ, and a BatchNorm that stays would go on counting."""
    net = nn.Sequential(tiny(), nn.BatchNorm1d(3), nn.Dropout(0.9)).train()
    student, report = distill(net, copy.deepcopy(net), images[:64], steps=2)
    assert report.loss_before == report.loss_after == 0
    assert same(state_of(student), state_of(net))


def test_frozen_parameters_stay_frozen(images: Tensor) -> None:
    net = tiny()
    converted = pn_compiler.transform(net, norm="instance")
    converted.get_parameter("5.weight").requires_grad_(False)
    student, _ = distill(converted, net, images[:64], steps=3)
    assert not student.get_parameter("5.weight").requires_grad
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, converted.get_parameter(n))}
    assert changed == dict(converted.named_parameters()).keys() - {"5.weight"}


@pytest.mark.parametrize("lr", [0.5, 1e30])
def test_it_never_ends_worse_than_it_began(
    lr: float, images: Tensor, teacher: nn.Module, converted: nn.Module
) -> None:
    student, report = distill(converted, teacher, images[:128], steps=12, lr=lr)
    assert report.best_step == 0
    assert report.loss_after == report.loss_before
    assert same(state_of(student), state_of(converted))
    assert "the original model" in str(report)


def test_the_best_step_wins(
    monkeypatch: pytest.MonkeyPatch, images: Tensor, teacher: nn.Module, converted: nn.Module
) -> None:
    """A loss that turns round after 10 steps, of 16 samples each, but not for the 13 held-out samples."""
    monkeypatch.setattr(trainer, "EVALUATE_EVERY", 10)
    calls = []

    def loss(student: Tensor, expected: Tensor) -> Tensor:
        result = output_loss(student, expected)
        calls.append(len(expected))
        return result if calls.count(16) <= 10 or len(expected) != 16 else -100 * result

    _, report = distill(
        converted, teacher, images[:64], steps=30, batch_size=16, lr=1e-3, held_out=0.2, loss=loss
    )
    assert (report.best_step, report.steps, report.held_out) == (10, 30, 13)


def test_steps_that_are_too_long_become_shorter(
    monkeypatch: pytest.MonkeyPatch, images: Tensor, teacher: nn.Module, converted: nn.Module
) -> None:
    """What a learning rate that is 100 times too high has spoilt is taken back."""
    monkeypatch.setattr(trainer, "EVALUATE_EVERY", 5)
    x = images[:256]
    _, report = distill(converted, teacher, x, steps=60, lr=0.2)
    assert report.rollbacks > 1
    assert report.best_step > 10
    assert report.loss_after < 0.8 * report.loss_before
    assert f"rolled back to its best state and lowered the learning rate {report.rollbacks}" in str(report)
    monkeypatch.setattr(trainer, "BACKOFF", 1.0)
    _, other = distill(converted, teacher, x, steps=60, lr=0.2)
    assert other.loss_after > report.loss_after


def test_no_steps_only_measure(images: Tensor, teacher: nn.Module, converted: nn.Module) -> None:
    student, report = distill(converted, teacher, images[:64], steps=0)
    assert (report.steps, report.best_step) == (0, 0)
    assert report.loss_before == report.loss_after > 0
    assert same(state_of(student), state_of(converted))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_ends_it(
    monkeypatch: pytest.MonkeyPatch, where: str, images: Tensor, teacher: nn.Module, converted: nn.Module
) -> None:
    monkeypatch.setattr(trainer, "EVALUATE_EVERY", 10)
    calls = []

    def loss(student: Tensor, expected: Tensor) -> Tensor:
        if len(expected) == 16:
            calls.append(0)
        if len(calls) != 14 or len(expected) != 16:
            return output_loss(student, expected)
        return (
            student.sum() * math.nan if where == "loss" else (student - student.detach()).abs().sqrt().sum()
        )

    student, report = distill(converted, teacher, images[:64], steps=30, batch_size=16, loss=loss)
    assert (report.steps, report.best_step) == (13, 10)
    assert report.stopped == "loss or gradient of step 14 is nan or infinite"
    assert str(report).endswith(f"stopped: {report.stopped}")
    assert all(bool(p.isfinite().all()) for p in student.parameters())


def test_the_report_is_text_and_json(images: Tensor, teacher: nn.Module, converted: nn.Module) -> None:
    _, report = distill(converted, teacher, images[:64], steps=2)
    first, second, third = str(report).splitlines()
    assert re.fullmatch(r"2 steps on 51 samples in \d+\.\d s; the best is step 2", first)
    assert re.fullmatch(
        r"on 13 held-out samples: loss \S+ -> \S+, the teacher's class \S+ % -> \S+ %, "
        r"KL divergence \S+ -> \S+ nats",
        second,
    )
    assert third == "output is taken for logits of 10 classes"
    assert json.loads(report.to_json()) == dataclasses.asdict(report)


# What it learns from -------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same(images: Tensor, teacher: nn.Module) -> None:
    """With a loader that shuffles by itself, too."""
    converted = pn_compiler.transform(teacher)
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        loader = DataLoader(TensorDataset(images[:200], torch.arange(200)), batch_size=16, shuffle=True)
        student, report = distill(converted, teacher, loader, steps=30, max_samples=120)
        results.append((state_of(student), without_seconds(report)))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][1].training + results[0][1].held_out == 120
    other, _ = distill(converted, teacher, loader, steps=30, max_samples=120, seed=1)
    assert not same(state_of(other), results[0][0])


def test_the_mode_of_the_caller_does_not_matter(images: Tensor) -> None:
    results = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            student, _ = distill(pn_compiler.transform(tiny()), tiny(), images[:64] + 0, steps=3)
        results.append(state_of(student))
        assert not any(p.is_inference() for p in student.parameters())
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_a_batch_is_cut_into_samples(images: Tensor) -> None:
    """However the samples come, the steps are the same."""
    net = tiny()
    converted = pn_compiler.transform(net)
    x = images[:96]
    ways: list[Any] = [
        x,
        {"input": x},
        Inputs((x,)),
        x.split(32),
        list(x.split(1)),
        (batch for batch in x.split(20)),  # a generator: it is read once
        [(batch, torch.zeros(len(batch))) for batch in x.split(32)],
        DataLoader(TensorDataset(x), batch_size=7),
    ]
    states = [state_of(distill(converted, net, way, steps=3, batch_size=16)[0]) for way in ways]
    assert all(same(state, states[0]) for state in states[1:])


class Dicts(nn.Module):
    """A network of a dict and an option."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()

    def forward(self, pair: dict[str, Tensor], scale: float = 1.0) -> Any:
        return self.inner(pair["left"] - pair["right"]) * scale


def test_nested_arguments_are_cut(images: Tensor) -> None:
    left, right = images[:96].split(48)
    batches = [{"pair": {"left": a, "right": b}, "scale": 2.0} for a, b in zip(left.split(8), right.split(8))]  # noqa: B905
    _, report = distill(Dicts(), Dicts(), batches, steps=2)
    assert (report.unit, report.training, report.held_out) == ("samples", 38, 10)
    batches[1]["scale"] = 3.0  # samples of two calls that do not fit together
    assert distill(Dicts(), Dicts(), batches, steps=2)[1].unit == "batches"


class Listed(nn.Module):
    """What torchvision's detectors take: a list of images [C, H, W] of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()

    def forward(self, images: list[Tensor]) -> Tensor:
        return torch.cat([self.inner(image[None]) for image in images])


def whole_batches(images: Tensor) -> Iterator[tuple[nn.Module, list[Any]]]:
    sizes = [x[:, :, :size, :size] for size, x in zip((8, 6) * 5, images[:20].split(2), strict=True)]
    yield tiny(), sizes
    yield Listed(), [(list(batch),) for batch in sizes]  # not cut along the channels
    yield Listed(), [([batch[0]],) for batch in sizes]


@pytest.mark.parametrize("case", range(3))
def test_batches_that_cannot_be_cut_stay_whole(case: int, images: Tensor) -> None:
    net, batches = list(whole_batches(images))[case]
    converted = net
    if isinstance(net, Listed):
        converted = copy.deepcopy(net)
        converted.inner = pn_compiler.transform(net.inner)
    else:
        converted = pn_compiler.transform(net)
    _, report = distill(converted, net, batches, steps=20, batch_size=64, lr=1e-3)
    assert (report.unit, report.training, report.held_out) == ("batches", 8, 2)
    assert "held-out batches" in str(report)
    assert report.loss_after < report.loss_before


def test_the_first_samples_are_held_in_memory(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    read = []

    def batches() -> Iterator[Tensor]:
        for number, batch in enumerate(images.split(10)):
            read.append(number)
            yield batch

    _, report = distill(tiny(), tiny(), batches(), steps=1, max_samples=25, held_out=0.4)
    assert (report.training, report.held_out) == (15, 10)
    assert read == [0, 1, 2]
    monkeypatch.setattr(samples, "_HELD_BYTES", 40 * images[0].nbytes)
    _, report = distill(tiny(), tiny(), images.split(10), steps=1)
    assert report.training + report.held_out == 40


def test_large_outputs_of_the_teacher_are_not_held(
    monkeypatch: pytest.MonkeyPatch, images: Tensor, teacher: nn.Module, converted: nn.Module
) -> None:
    held, one = distill(converted, teacher, images[:128], steps=5)
    monkeypatch.setattr(samples, "_KEPT_BYTES", 100)
    anew, other = distill(converted, teacher, images[:128], steps=5)
    assert one.loss_after == pytest.approx(other.loss_after, rel=1e-3)
    for actual, expected in zip(anew.parameters(), held.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


# Outputs -------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    one: Tensor
    two: Any


@dataclasses.dataclass
class Found:
    logits: Tensor
    more: Any


class Structured(nn.Module):
    """A detector's raw outputs: for two scales, scores [N, A, K] and boxes [N, A, 4], in some structure."""

    def __init__(self, pack: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 6, 1)
        self.classes = nn.Linear(4, 5)
        self.pack = pack
        randomize_batch_norms(self).eval()

    def forward(self, x: Tensor) -> Any:
        y = self.net(x)
        return self.pack(self.classes(y.mean((2, 3))), self.head(y), self.head(F.avg_pool2d(y, 2)))


STRUCTURES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "tuple": lambda a, b, c: (a, b, c),
    "dict": lambda a, b, c: {"logits": a, "maps": [b, c]},
    "named tuple": lambda a, b, c: Pair(a, (b, {"c": c})),
    "dataclass": lambda a, b, c: Found(a, [b, Found(c, None)]),
    "integers and None": lambda a, b, c: (a, None, a.argmax(1), b, 3, "text", [c]),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_of_outputs_add_up(name: str, images: Tensor) -> None:
    net = Structured(STRUCTURES[name])
    converted = copy.deepcopy(net)
    converted.net = pn_compiler.transform(net.net, norm="instance")
    x = images[:40]
    _, report = distill(converted, net, x, steps=2, held_out=0.999)  # one sample to train on
    assert (report.training, report.held_out) == (1, 39)
    assert report.agreement_before is not None
    _, report = distill(converted, net, x, steps=20, lr=1e-3)
    assert report.loss_after < report.loss_before
    net.pack = converted.pack = STRUCTURES["tuple"]
    with torch.no_grad():
        actual, expected = converted(x), net(x)
    by_parts = sum(float(output_loss(g, w)) for g, w in zip(actual, expected, strict=True))
    assert float(output_loss(actual, expected)) == pytest.approx(by_parts)
    assert float(
        output_loss(Found(actual[0], actual[1:]), Found(expected[0], expected[1:]))
    ) == pytest.approx(by_parts)


def test_the_loss_against_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    hot = losses.TEMPERATURE
    p, q = torch.softmax(t / hot, 1), torch.softmax(s / hot, 1)
    expected = hot**2 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(output_loss(s, t), expected)
    for shape in ((35,), (35, 1), (5, 7, 1)):  # no logits
        expected = (s - t).square().sum() / t.square().sum()
        torch.testing.assert_close(output_loss(s.reshape(shape), t.reshape(shape)), expected)
    torch.testing.assert_close(relative_l2([s, s], [t, s]), (s - t).square().sum() / t.square().sum())
    assert float(relative_l2(s, torch.zeros_like(s))) == pytest.approx(float(s.square().sum()))
    assert float(output_loss(t, t)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_is_computed_in_float32(dtype: torch.dtype) -> None:
    s, t = torch.full((2, 4), 300.0, dtype=dtype), torch.full((2, 4), 301.0, dtype=dtype)
    assert float(relative_l2(s, t)) < 1e-3  # 8 * 300^2 is no float16
    assert output_loss(s, t).dtype == torch.float32


def test_another_loss(images: Tensor) -> None:
    """Values [N, K] that are no logits: softmax would not see a constant."""
    net = tiny()
    shifted = copy.deepcopy(net)
    with torch.no_grad():
        shifted[5].bias += 1
    _, report = distill(shifted, net, images[:64], steps=5)
    assert report.loss_before < 1e-6
    _, report = distill(shifted, net, images[:64], steps=5, lr=0.1, loss=relative_l2)
    assert report.loss_after < 0.5 * report.loss_before


def test_one_dimensional_signals() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 6, 5), nn.BatchNorm1d(6), nn.GELU(),
        nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 1, 1),
    )  # fmt: skip
    randomize_batch_norms(net).eval()
    _, report = distill(pn_compiler.transform(net), net, torch.randn(60, 2, 30), steps=20, lr=1e-3)
    assert report.loss_after < report.loss_before
    assert report.agreement_after is None
    assert "class" not in str(report)


@pytest.mark.parametrize("name", TINY)
def test_networks_of_timm(name: str) -> None:
    torch.manual_seed(0)
    net = randomize_batch_norms(NETWORKS[name]()).eval()
    _, report = distill(pn_compiler.transform(net), net, pictures(12), steps=4, batch_size=4)
    assert report.loss_after < report.loss_before


# Interruptions -------------------------------------------------------------------------------------


STEPS = 7
OPTIONS: dict[str, Any] = {"steps": STEPS, "batch_size": 16, "lr": 1e-3}


def stopping_loss(call: int, stop: Callable[[], None]) -> Callable[[Any, Any], Tensor]:
    """`output_loss`, and `stop` in its call number `call`."""
    calls = []

    def loss(student: Any, expected: Any) -> Tensor:
        calls.append(0)
        if len(calls) == call:
            stop()
        return output_loss(student, expected)

    return loss


def interrupt() -> None:
    raise KeyboardInterrupt


class Noise(nn.Module):
    """Draws random numbers, in eval mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn_like(x)


@pytest.mark.parametrize("noise", [False, True])
def test_an_interrupted_run_goes_on_bit_for_bit(
    noise: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: Tensor
) -> None:
    """Interrupted in every call of the loss: in steps and evaluations, the initial one included."""
    monkeypatch.setattr(trainer, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(trainer, "EVALUATE_EVERY", 3)
    net = tiny()
    converted = nn.Sequential(pn_compiler.transform(net, norm="layer"), Noise() if noise else nn.Identity())
    before = state_of(converted)
    whole, report = distill(converted, net, images[:64], **OPTIONS)
    assert report.best_step == STEPS
    calls = 1 + STEPS + 3  # evaluations at 0, 3, 6 and 7, of one batch each
    for call in range(1, calls + 1):
        path = tmp_path / f"{call}.pt"
        for number in (call, 2) if call % 4 == 0 else (call,):  # some are interrupted twice
            loss = stopping_loss(number, interrupt)
            with pytest.raises(KeyboardInterrupt):
                distill(converted, net, images[:64], **OPTIONS, checkpoint=path, loss=loss)
        assert same(state_of(converted), before)
        assert path.exists() == (call > 2)
        again, second = distill(converted, net, images[:64], **OPTIONS, checkpoint=path)
        assert same(state_of(again), state_of(whole))
        assert without_seconds(second) == without_seconds(report)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{c}.pt" for c in range(1, calls + 1))


def test_a_finished_run_is_read_back(tmp_path: Path, images: Tensor) -> None:
    net = tiny()
    converted = pn_compiler.transform(net)
    path = tmp_path / "checkpoint"
    one, report = distill(converted, net, images[:64], **OPTIONS, checkpoint=path)
    loss = stopping_loss(2, interrupt)  # only the initial evaluation is repeated
    two, other = distill(converted, net, images[:64], **OPTIONS, checkpoint=path, loss=loss)
    assert same(state_of(one), state_of(two))
    assert without_seconds(other) == without_seconds(report)


def test_a_run_that_went_back_goes_on_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: Tensor
) -> None:
    monkeypatch.setattr(trainer, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(trainer, "EVALUATE_EVERY", 2)
    net = tiny()
    converted = pn_compiler.transform(net)
    options = {**OPTIONS, "lr": 0.5}
    whole, report = distill(converted, net, images[:64], **options)
    assert 0 < report.rollbacks < report.best_step
    for call in range(3, 1 + STEPS + 4 + 1):
        path = tmp_path / f"{call}.pt"
        with pytest.raises(KeyboardInterrupt):
            distill(
                converted, net, images[:64], **options, checkpoint=path, loss=stopping_loss(call, interrupt)
            )
        again, second = distill(converted, net, images[:64], **options, checkpoint=path)
        assert same(state_of(again), state_of(whole))
        assert without_seconds(second) == without_seconds(report)


def train_until_killed(path: Path, where: str, count: int) -> None:
    """Goes on from the checkpoint until the process, a copy of this one, is killed; else compares the end."""
    calls: list[int] = []

    def kill_at(number: int) -> None:
        calls.append(0)
        if len(calls) == number:
            killed.kill_this_process()

    def loss(student: Any, teacher: Any) -> Tensor:
        if where == "step":
            kill_at(count)
        return output_loss(student, teacher)

    if where == "write":  # the new file is there under another name, not yet in place
        replace = os.replace

        def counted(*names: Any) -> None:
            kill_at(count)
            replace(*names)

        os.replace = counted  # type: ignore[assignment]

    def train(checkpoint: Path | None) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        randomize_batch_norms(net).eval()
        options = {"steps": 13, "batch_size": 16, "lr": 1e-3, "loss": loss, "checkpoint": checkpoint}
        student, report = distill(pn_compiler.transform(net), net, torch.randn(64, 1, 8, 8), **options)
        return [*student.state_dict().values(), torch.tensor(report.loss_after)]

    resumed = train(path)
    assert all(map(torch.equal, resumed, train(None)))


def test_a_killed_run_goes_on_bit_for_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trainer, "SAVE_EVERY", 0.0)
    path = tmp_path / "checkpoint"
    assert killed.exit_code(train_until_killed, path, "step", 6) == -signal.SIGKILL
    assert torch.load(path)["step"] == 4
    assert killed.exit_code(train_until_killed, path, "write", 4) == -signal.SIGKILL
    assert torch.load(path)["step"] == 7
    assert killed.exit_code(train_until_killed, path, "", 0) == 0
    assert torch.load(path)["step"] == 13


CHANGES: dict[str, dict[str, Any]] = {
    "steps": {"steps": STEPS + 1},
    "batch_size": {"batch_size": 8},
    "lr": {"lr": 2e-3},
    "seed": {"seed": 1},
    "held_out": {"held_out": 0.3},
    "max_samples": {"max_samples": 100},
}  # fmt: skip


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, images: Tensor) -> None:
    net = tiny()
    converted = pn_compiler.transform(net)
    path = tmp_path / "checkpoint"
    distill(converted, net, images[:64], **OPTIONS, checkpoint=path)
    content = path.read_bytes()

    def differs(name: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(
            ConfigError, match=f"another distillation, which differs in {name}: give the same"
        ):
            distill(*arguments, **{**OPTIONS, **options}, checkpoint=path)

    for name, change in CHANGES.items():
        differs(name, converted, net, images[:64], **change)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].bias += 1e-3
    differs("samples", converted, net, images[1:65])
    differs("model", pn_compiler.transform(other), net, images[:64])
    differs("model", net, net, images[:64])
    differs("teacher", converted, other, images[:64])
    with pytest.raises(ConfigError, match=r"another distillation: its loss began at \S+, here it is"):
        distill(converted, net, images[:64], **OPTIONS, loss=relative_l2, checkpoint=path)
    assert path.read_bytes() == content


def damage(content: bytes) -> Iterator[bytes]:
    yield b""
    yield b"text"
    yield content[: len(content) // 2]
    yield content[:-10]
    for place in range(0, len(content), len(content) // 40):
        yield content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]
    for value in ({"step": 1}, [1], tiny().state_dict()):
        file = io.BytesIO()
        torch.save(value, file)
        yield file.getvalue()


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, images: Tensor) -> None:
    """Or harmless: a bit that is not read."""
    net = tiny()
    converted = pn_compiler.transform(net)
    path = tmp_path / "checkpoint"
    student, _ = distill(converted, net, images[:64], **OPTIONS, checkpoint=path)
    refused = 0
    for content in damage(path.read_bytes()):
        path.write_bytes(content)
        message = ""
        try:
            again, _ = distill(converted, net, images[:64], **OPTIONS, checkpoint=path)
        except LoadError as error:
            message = str(error)
        assert not message or (str(path) in message and "\n" not in message and path.read_bytes() == content)
        assert message or same(state_of(again), state_of(student))
        refused += bool(message)
    assert refused > 20


def test_a_checkpoint_runs_no_code(tmp_path: Path, images: Tensor) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "checkpoint"
    torch.save({"kind": Hostile()}, path)
    with pytest.raises(LoadError, match="damaged or no checkpoint"):
        distill(tiny(), tiny(), images[:64], checkpoint=path)
    assert not (tmp_path / "ran").exists()


def test_a_place_that_cannot_be_written_is_said_first(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "checkpoint"):
        with pytest.raises(ExportError, match="cannot write"):
            distill(tiny(), tiny(), iter(()), checkpoint=path)


# Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", -1), ("batch_size", 0), ("lr", 0.0), ("lr", math.nan), ("lr", math.inf), ("max_samples", 1),
     ("held_out", 0.0), ("held_out", 1.0)],
)  # fmt: skip
def test_impossible_options(option: str, value: float, images: Tensor) -> None:
    with pytest.raises(ConfigError, match=f"{option}={value} is impossible: expected"):
        distill(tiny(), tiny(), images[:8], **{option: value})


def test_data_that_cannot_be_used(images: Tensor) -> None:
    bad = images[:8].clone()
    bad[3] = math.nan
    for batches, message in (
        ([], "there is no batch for the distillation data"),
        ([images[:4], bad], "batch 2 holds values that are nan or infinite"),
        (images[:1], "there is one batch, which cannot be cut into samples: at least two are needed"),
        (images[:4, :, :2], r"does not run on a batch for the teacher \(\[4, 1, 2, 8\] float32\): "),
        (torch.zeros(8, 3, 8, 8), "does not run on a batch for the teacher"),
    ):
        with pytest.raises(ConfigError, match=message):
            distill(tiny(), tiny(), batches)


class Other(nn.Module):
    """A network with one parameter and any output."""

    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(self.scale * x.flatten(1))


def test_models_that_do_not_fit(images: Tensor) -> None:
    x = images[:16]
    flat = Other(lambda x: x)
    integers = Other(lambda x: x.argmax(1))
    constant = Other(torch.ones_like)
    infinite = Other(lambda x: x / 0)
    for model, teacher, message in (
        (flat, Other(lambda x: x[:, :5]), r"output of the model is \[4, 64\], that of the teacher \[4, 5\]"),
        (flat, Other(lambda x: {"a": x}), r"the model gives output, the teacher output\['a'\]"),
        (integers, flat, "the model gives no floating-point tensor, the teacher output"),
        (integers, integers, "the teacher's output holds no floating-point tensor"),
        (constant, flat, "does not depend on any parameter"),
        (flat, infinite, "output of the teacher holds nan or infinite values"),
        (infinite, flat, "before the first step"),
        (tiny().requires_grad_(False), tiny(), "no parameter of the model requires a gradient"),
        (tiny().bfloat16(), tiny(), r"0.weight is bfloat16, too coarse.*in float32 \(model.float\(\)\)"),
        (tiny().to("meta"), tiny(), "the model has no values"),
        (tiny(), tiny().to("meta"), "the model has no values"),
    ):
        with pytest.raises(ConfigError, match=message):
            distill(model, teacher, x, batch_size=4, held_out=0.25)
    with pytest.raises(ConfigError, match="must return one floating-point number"):
        distill(flat, flat, x, loss=lambda s, t: s - t)


def test_the_folded_network_cannot_be_trained(images: Tensor) -> None:
    net = tiny()
    folded = pn_compiler.fold(pn_compiler.transform(net))
    with pytest.raises(ConfigError, match="distill it before it is folded"):
        distill(folded, net, images[:8])
