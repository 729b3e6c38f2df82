"""The benchmark of small batches: members of an ensemble train as they would alone. Rendered characters."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from benchmarks import ensemble, glyphs, small_batch, tasks
from benchmarks.small_batch import RECIPES, Recipe
from pn_compiler import param_groups
from pn_compiler.base.errors import ConfigError
from pn_compiler.testing import assert_same_outputs

SMALL = dataclasses.replace(
    RECIPES["digits"], blocks=1, train=32, validation=20, test=20, epochs=1, seeds=2, rates=(1e-3, 4e-3),
    batch_sizes=(4,),
)  # fmt: skip
SEEDS, RATES = [3, 5], [0.01, 0.03]


def member(network: nn.Module, index: int, members: int) -> dict[str, Tensor]:
    """The state of one member of an ensemble."""
    state = network.state_dict()
    return {
        name: value if value.dim() == 0 else value.chunk(members)[index]
        for name, value in state.items()
    }  # fmt: skip


def trained(variant: str, seeds: list[int], rates: list[float]) -> nn.Module:
    network = small_batch.build(SMALL, SMALL.variants()[variant], seeds).double()
    images, labels = small_batch.load(SMALL, "cpu")["train"]
    ensemble.train(
        network,
        (images.double(), labels),
        seeds=seeds,
        rates=rates,
        batch_size=4,
        epochs=1,
        weight_decay=0.01,
    )
    return network


@pytest.mark.parametrize("variant", ["BN", "IN", "LN", "GN4", "LN+PN", "GN4+PN output padding"])
def test_members_of_an_ensemble_train_as_they_would_alone(variant: str) -> None:
    together = trained(variant, SEEDS, RATES)
    for index, (seed, rate) in enumerate(zip(SEEDS, RATES, strict=True)):
        alone = trained(variant, [seed], [rate])
        assert_same_outputs(member(together, index, 2), member(alone, 0, 1), tolerance=1e-11)


def test_a_member_is_what_torch_trains() -> None:
    """One member against torch.optim.SGD with the same parameter groups, samples and learning rates."""
    variant = SMALL.variants()["GN4+PN"]
    images, labels = small_batch.load(SMALL, "cpu")["train"]
    images = images.double()
    expected = small_batch.build(SMALL, variant, [3]).double()
    optimizer = torch.optim.SGD(param_groups(expected, 0.01), lr=0.02, momentum=small_batch.MOMENTUM)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    for step, rows in enumerate(order.split(4)):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * ensemble.schedule(step, 8)
        optimizer.zero_grad()
        F.cross_entropy(expected(images[rows].unsqueeze(1)).squeeze(1), labels[rows]).backward()
        optimizer.step()
    actual = trained("GN4+PN", [3], [0.02])
    assert_same_outputs(actual.state_dict(), expected.state_dict(), tolerance=1e-11)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_every_variant_is_converted_as_it_is_called(recipe: Recipe) -> None:
    channels = [3 * width for width in recipe.widths]
    for name, variant in recipe.variants().items():
        network = small_batch.build(recipe, variant, [0, 1, 2])
        if name == "BN":
            continue
        for site in pn_compiler.sites(network):
            assert site.kind == ("pn" if "PN" in name else "norm_only"), name
            assert site.num_groups == 3 * variant.groups if variant.groups else site.num_groups in channels


def test_the_command_goes_on_where_it_was_stopped(tmp_path, capsys) -> None:
    path = tmp_path / "cells.json"
    arguments = ["--dataset", "digits", "--json", str(path), "--jobs", "1", "--seeds", "2", "--epochs", "1"]
    arguments += ["--train", "128", "--variants", "LN+PN", "--batch-sizes", "64"]
    assert small_batch.main(arguments) == 0
    (row,) = json.loads(path.read_text())
    assert [len(accuracies) for accuracies in row["test"]] == [2] * len(RECIPES["digits"].rates)
    row["seconds"] = -1.0
    path.write_text(json.dumps([row]))
    capsys.readouterr()
    assert small_batch.main([*arguments, "128"]) == 0
    kept, added = json.loads(path.read_text())
    assert kept == row  # read, not run again
    assert (added["variant"], added["batch_size"]) == ("LN+PN", 128)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "| batch size | 64 | 128 |"
    assert [line.count("±") for line in printed if line.startswith("| LN+PN |")] == [2]


def test_a_file_of_something_else_is_an_error(tmp_path) -> None:
    path = tmp_path / "cells.json"
    for content in ("no JSON", '[{"model": "resnet50"}]', '{"a": 1}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match="not written by this benchmark"):
            tasks.read(path, "recipe", "variant", "batch_size")


def test_the_table_takes_the_rate_that_is_best_on_validation_data() -> None:
    recipe = dataclasses.replace(SMALL, rates=(1, 2, 3), batch_sizes=(4, 8))
    row = {"variant": "LN", "batch_size": 4, "validation": [[10, 20], [40, 20], [30, 20]]}
    row["test"] = [[90, 91], [50, 52], [70, 70]]
    line = next(line for line in small_batch.table(recipe, [row]).splitlines() if line.startswith("| LN |"))
    assert line == "| LN | 51.0 ± 1.4 |  |"


def test_batch_sizes_that_would_leave_samples_out_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no multiple of the batch sizes \[3\]"):
        dataclasses.replace(SMALL, batch_sizes=(3, 4))


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("own_cache")
def test_glyphs_are_the_same_for_a_seed_and_others_for_another() -> None:
    images, labels = glyphs.load("train", 64, seed=1)
    assert images.shape == (64, 1, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min(), images.max()) == (0, 1)
    assert set(labels.tolist()) <= set(range(62))
    (stored,) = glyphs.cache_folder().iterdir()
    again = glyphs.load("train", 64, seed=1)
    stored.unlink()
    rendered = glyphs.load("train", 64, seed=1)
    assert_same_outputs((again, rendered), ((images, labels), (images, labels)), tolerance=0)
    assert_same_outputs(glyphs.load("train", 16, seed=1), (images[:16], labels[:16]), tolerance=0)
    for other in (glyphs.load("train", 64, seed=2), glyphs.load("test", 64, seed=1)):
        assert not torch.equal(other[0], images)


def test_every_font_has_every_class_and_no_font_is_in_both_splits() -> None:
    assert not set(glyphs.FONTS["train"]) & set(glyphs.FONTS["test"])
    for font in (*glyphs.FONTS["train"], *glyphs.FONTS["test"]):
        masks = {bytes(glyphs._font(font).getmask(character)) for character in glyphs.CLASSES}
        assert len(masks) == len(glyphs.CLASSES)
    for symbols in ("STIXSizOneSymReg", "DejaVuSansDisplay", "nothing"):
        with pytest.raises(ConfigError, match=symbols):
            glyphs._font(symbols)


def test_glyphs_refuse_an_unknown_split() -> None:
    with pytest.raises(ConfigError, match="'train' or 'test'"):
        glyphs.load("validation", 1)  # type: ignore[arg-type]
