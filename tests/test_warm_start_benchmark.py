"""The benchmark of warm starts: its networks, its scenes, the cache, and a command that goes on."""

import dataclasses
import functools
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import pn_compiler
from benchmarks import scenes, tasks, trained, warm_start
from benchmarks.cache import cached
from benchmarks.trained import RECIPES
from pn_compiler.base.errors import ConfigError
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

KINDS = {  # sites behind which proxy normalization stands after a warm start, and those without
    "resnet20": (9, 12),
    "mobilenet": (13, 7),
    "efficientnet": (7, 13),
    "unet": (8, 6),
}
SMALL = {"train": 128, "validation": 8, "test": 16, "epochs": 1}


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained._load_parts.cache_clear()
    yield
    trained._load_parts.cache_clear()


@pytest.fixture
def small(own_cache, monkeypatch) -> None:
    """Trainings of one step, in this process."""
    recipes = {name: dataclasses.replace(recipe, **SMALL) for name, recipe in RECIPES.items()}
    monkeypatch.setattr(trained, "RECIPES", recipes)
    monkeypatch.setattr(tasks, "run", lambda function, costs, jobs: (function(*task) for task in costs))


@pytest.mark.parametrize("name", KINDS)
def test_the_networks_convert_strictly(name: str) -> None:
    recipe = RECIPES[name]
    pixels = scenes.PIXELS if recipe.segments else 32
    network = randomize_batch_norms(trained.untrained(recipe)).eval()
    images = torch.randn(2, 1, pixels, pixels)
    classes = network(images).shape[1]
    assert network(images).shape[2:] == (images.shape[2:] if recipe.segments else ())
    assert classes == (11 if recipe.segments else 62)
    for groups in (1, 8):
        converted = pn_compiler.transform(network, images, num_groups=groups, strict=True)
        kinds = [site.kind for site in pn_compiler.sites(converted)]
        assert (kinds.count("pn"), kinds.count("norm_only")) == KINDS[name]
        assert converted(images).isfinite().all()


@pytest.mark.parametrize(("name", "groups"), [("resnet20 LN+PN", 1), ("resnet20 GN8+PN", 8)])
def test_the_networks_from_scratch_have_proxy_normalization_behind_every_normalizer(name, groups) -> None:
    found = pn_compiler.sites(trained.untrained(RECIPES[name]))
    assert {site.num_groups for site in found} == {groups}
    assert [site.kind for site in found if site.activation] == ["pn"] * 10


def test_scenes_are_the_same_for_a_seed_and_others_for_another() -> None:
    images, masks = scenes.render("train", 24, seed=1).values()
    assert images.shape == masks.shape == (24, 48, 48)
    assert images.dtype == masks.dtype == torch.uint8
    assert masks.unique().tolist() == list(range(11))
    again = scenes.render("train", 16, seed=1)
    assert_same_outputs((again["images"], again["masks"]), (images[:16], masks[:16]), tolerance=0)
    for other in (scenes.render("train", 24, seed=2), scenes.render("test", 24, seed=1)):
        assert not torch.equal(other["images"], images)


def test_a_mask_has_the_digits_that_were_drawn(monkeypatch) -> None:
    drawn: list[int] = []
    block = np.pad(np.ones((8, 8)), 12)

    def placed(random, fonts, character, offset):
        drawn.append(int(character))
        return block

    monkeypatch.setattr(scenes.glyphs, "_placed", placed)
    random = np.random.default_rng(0)
    for _ in range(20):
        drawn.clear()
        _, mask = scenes.scene(random, ("none",))
        pixels = np.bincount(mask.ravel(), minlength=11)[1:]
        assert (pixels % 64 == 0).all()  # whole blocks
        assert (pixels <= 64 * np.bincount(drawn, minlength=10)).all()
        assert pixels[drawn[0]]  # nothing was in the way of the first


def test_digits_stand_out_of_the_background() -> None:
    images, masks = scenes.render("test", 100, seed=0).values()
    paper = images.flatten(1).float().quantile(0.5, dim=1)[:, None, None]
    away = (images - paper).abs() / 255
    assert away[masks > 0].mean() > 0.3
    assert away[masks == 0].mean() < 0.12


def test_a_score_is_the_accuracy_or_the_mean_intersection_over_union() -> None:
    logits = torch.eye(3)
    network = torch.nn.Identity()
    assert trained.score(network, (logits, torch.tensor([0, 1, 1]))) == pytest.approx(200 / 3)
    masks = torch.tensor([[[0, 1, 1, 1]]])  # predicted: 0, 1, 2, 2
    pixels = logits[[0, 1, 2, 2]].T[None, :, None]
    assert trained.score(network, (pixels, masks)) == pytest.approx(100 * (1 + 1 / 3 + 0) / 3)


@pytest.mark.usefixtures("own_cache")
def test_the_cache_makes_a_thing_once_for_each_source_and_nothing_when_interrupted() -> None:
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("kind", "a name", "source", interrupted)
    value = torch.arange(3.0)
    assert torch.equal(cached("kind", "a name", "source", lambda: {"a": value})["a"], value)
    assert torch.equal(cached("kind", "a name", "source", interrupted)["a"], value)
    assert cached("kind", "a name", "another", lambda: {"a": -value})["a"][2] == -2
    folder = trained.glyphs.cache_folder().parent / "kind"
    assert len(list(folder.iterdir())) == 2


@pytest.mark.usefixtures("small")
def test_a_network_is_trained_once(monkeypatch) -> None:
    first = trained.load_network("unet")
    assert not first.training
    monkeypatch.setattr(trained, "_trained_state", None)
    second = trained.load_network("unet")
    assert_same_outputs(second.state_dict(), first.state_dict(), tolerance=0)
    start = trained.untrained(trained.RECIPES["unet"])
    assert not torch.equal(start.head.weight, second.head.weight)


@pytest.mark.usefixtures("own_cache")
def test_data_have_mean_0_and_deviation_1_over_the_training_set() -> None:
    parts = trained._load_parts(True, 16, 4, 8)
    assert [len(images) for images, _ in parts.values()] == [16, 4, 8]
    images, masks = parts["train"]
    assert (images.shape, masks.shape) == ((16, 1, 48, 48), (16, 48, 48))
    torch.testing.assert_close(torch.stack([images.mean(), images.std()]), torch.tensor([0.0, 1.0]))


def test_an_unknown_network_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no network 'vgg'"):
        trained.load_data("vgg")


@pytest.mark.usefixtures("small")
def test_the_command_goes_on_where_it_was_stopped(tmp_path, capsys) -> None:
    path = tmp_path / "rows.json"
    options = ["--json", str(path), "--networks", "resnet20", "--groups", "1", "8", "--methods", "batch-norm"]
    assert warm_start.main(options) == 0
    (row,) = json.loads(path.read_text())
    assert list(row["scores"]) == ["BatchNorm"]
    row["scores"]["BatchNorm"] = 12.34
    path.write_text(json.dumps([row]))
    capsys.readouterr()
    assert warm_start.main([*options, "plain", "running-statistics"]) == 0
    kept, *added = json.loads(path.read_text())
    assert kept == row  # read, not run again
    assert {(new["method"], new["groups"]) for new in added} == {
        (method, groups) for method in ("plain", "running-statistics") for groups in (1, 8)
    }
    printed = capsys.readouterr().out.splitlines()
    lines = [line.split(" | ") for line in printed if line.startswith("| resnet20 |")]
    assert [line[1:3] for line in lines] == [["1", "12.3"], ["8", "12.3"]]
    assert all(all(cell.strip() for cell in line[:6]) for line in lines)


@pytest.mark.slow  # it trains
@pytest.mark.usefixtures("small")
def test_the_methods_fill_all_columns(monkeypatch) -> None:
    monkeypatch.setattr(pn_compiler, "distill", functools.partial(pn_compiler.distill, steps=1))
    monkeypatch.setattr(warm_start, "RECOVERY", 1)
    asked = warm_start.chosen_tasks(["resnet20", "resnet20 GN8+PN"], list(warm_start.METHODS), [8])
    rows = [warm_start.run_row(*task) for task in asked]
    assert [(row["network"], row["groups"]) for row in rows].count(("resnet20 GN8+PN", 8)) == 1
    for titles in (warm_start.WARM, warm_start.SCRATCH):
        line = warm_start.table(rows, titles).splitlines()[-1]
        assert line.count("|") == 3 + len(titles)
        assert "|  |" not in line
    assert "; " not in warm_start.caption(rows).split(". ")[0]  # both on the same data


@pytest.mark.usefixtures("small")
def test_a_plain_replacement_keeps_weight_and_bias_and_that_of_opacus_does_not() -> None:
    network = trained.load_network("resnet20")
    for groups in (4, 32):
        found = warm_start.plain("resnet20", groups)
        for title, replaced in found.items():
            (norm, *_) = (m for m in replaced.modules() if isinstance(m, torch.nn.GroupNorm))
            assert norm.num_groups == min(groups, 16)
            expected = network[0][1].weight if title == "GroupNorm" else torch.ones(16)
            assert torch.equal(norm.weight, expected)


@pytest.mark.parametrize("option", ["--networks", "--methods"])
def test_the_command_names_what_it_knows(option) -> None:
    with pytest.raises(ConfigError, match=r"unknown: \['nothing'\]; expected some of"):
        warm_start.main([option, "nothing"])


def test_a_file_of_something_else_is_an_error(tmp_path) -> None:
    path = tmp_path / "rows.json"
    for content in ("no JSON", '[{"model": "resnet50"}]', '{"a": 1}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match="not written by this benchmark"):
            tasks.read(path, "network")
