"""Recipes: the options of the command in a file, validated as those that are typed."""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from pn_compiler import cli, recipes
from pn_compiler.arguments import make_parser
from pn_compiler.base.errors import ExportError
from pn_compiler.base.recipe_file import MOST_BYTES
from pn_compiler.testing import randomize_batch_norms
from tests.test_options import TYPED

RECIPE = Path("recipe.yaml")
EVERYTHING = (
    "model.pt", "-o", "m.onnx", "--report", "r.json", "--report", "r.html", "-vv", "--arch", "a.b:C",
    "--allow", "a.B", "--allow", "c.D", "--checkpoint-key", "k", "--part", "p.q", "--unsafe-pickle",
    "--input-shape", "1,3,8,8", "--input-shape", "1x5", "--input", "tokens:int64:1,128", "--input", "1,2",
    "--calibrate", "data.npy", "--mean", "0.5,0.25", "--std", "0.5,1e-3", "--resize", "8,9", "--crop", "4",
    "--interpolation", "bicubic", "--allow-data-code", "--dry-run", "--node-data", "nodes",
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    torch.save(randomize_batch_norms(net), tmp_path / "model.pt")
    return tmp_path


def parse(typed: Sequence[str]) -> argparse.Namespace:
    arguments = make_parser().parse_args(typed)
    return arguments if arguments.config is None else recipes.complete(arguments)


def parsed(text: str, *typed: str) -> dict[str, object]:
    """What the command is asked for by a recipe and what is `typed`, without the name of the recipe."""
    RECIPE.write_text(text)
    found = vars(parse([*typed, "--config", str(RECIPE)]))
    assert found.pop("config") == RECIPE
    return found


def typed_alone(*typed: str) -> dict[str, object]:
    found = vars(parse(typed))
    del found["config"]
    return found


def refusal(content: bytes, capsys: pytest.CaptureFixture[str]) -> str:
    RECIPE.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        cli.main(["--config", str(RECIPE)])
    assert caught.value.code == cli.USAGE
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("pn-compile: error: ")
    assert "Traceback" not in err
    return err.partition("; usage")[0]


SHAPE = ("--input-shape", "1,3,8,8")
MANY = (
    "model.pt", "-o", "m.onnx", *SHAPE, "--norm", "group", "--num-groups", "2", "--no-proxy", "--opset", "18",
    "--warm-start", "running_stats", "--input-names", "image", "--dynamic", "H,W", "--report", "r.json", "-q",
)  # fmt: skip


def test_a_saved_recipe_gives_the_same_file(folder: Path) -> None:
    assert cli.main([*MANY, "--save-config", "recipe.yaml"]) == cli.DONE
    first = hashlib.sha256((folder / "m.onnx").read_bytes()).hexdigest()
    report = json.loads((folder / "r.json").read_text())
    for name in ("m.onnx", "r.json"):
        (folder / name).unlink()
    assert cli.main(["--config", "recipe.yaml", "--save-config", "again.yaml"]) == cli.DONE
    assert hashlib.sha256((folder / "m.onnx").read_bytes()).hexdigest() == first
    assert json.loads((folder / "r.json").read_text()).keys() == report.keys()
    saved = (folder / "recipe.yaml").read_text()
    assert saved.partition("model:")[2] == (folder / "again.yaml").read_text().partition("model:")[2]
    assert len([line for line in saved.splitlines() if not line.startswith("#")]) == 12  # no defaults


@pytest.mark.parametrize("typed", [EVERYTHING, MANY, *TYPED], ids=lambda words: " ".join(words)[:40])
def test_all_that_is_typed_is_read_back(typed: tuple[str, ...]) -> None:
    recipes.save(parse(typed), RECIPE)
    assert parsed(RECIPE.read_text()) == typed_alone(*typed)


def test_a_saved_recipe_has_a_line_for_each_option() -> None:
    recipes.save(parse(("model.pt", "-o", "m.onnx", "--leaf", "a", "--leaf", "b")), RECIPE)
    lines = [line for line in RECIPE.read_text().splitlines() if not line.startswith("#")]
    assert lines == ["model: model.pt", "output: m.onnx", "leaf: [a, b]"]


@pytest.mark.parametrize(
    "name",
    ["yes", "1.20", "null", "~", "-o", "--norm", "a: b", "a #b", " a ", "'", '"', "ä\n\t", "[x]", "*x", "a,b",
     os.fsdecode(b"\xff"), "x" * 300, "2024-01-01", "1e3", "0x1f", "!!str", "%a", "{}", "#", "true", "0"],
)  # fmt: skip
def test_all_names_are_read_back(name: str) -> None:
    typed = (f"--output={name}", f"--leaf={name}", "--leaf=b", f"--target-ort={name}", "--", name)
    recipes.save(parse(typed), RECIPE)
    assert parsed(RECIPE.read_text()) == typed_alone(*typed)


def test_every_flag_has_a_place_but_those_about_the_command() -> None:
    wanted = {a.dest for a in make_parser().actions()} - {
        "help", "version", "list_passes", "config", "save_config",
    }  # fmt: skip
    given = {
        name
        for words in (*TYPED, EVERYTHING, ("-q", "--diagnose=d", "--plot=p.png"))
        for name in written(words)
    }
    assert given == wanted


def written(typed: tuple[str, ...]) -> set[str]:
    recipes.save(parse(typed), RECIPE)
    names = yaml.safe_load(RECIPE.read_text())
    actions = {flag[2:]: a.dest for a in make_parser().actions() for flag in a.option_strings}
    return {actions.get(name, name) for name in names}


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("norm: group", ("--norm", "group")),
        ("num_groups: 4", ("--num-groups", "4")),
        ("target-ort: 1.20", ("--target-ort", "1.20")),  # a number to YAML, 1.2
        ("error-budget: 1e-3", ("--error-budget", "1e-3")),  # a text to PyYAML
        ("proxy: false", ("--no-proxy",)),
        ("proxy: on", ("--proxy",)),
        ("strict: True", ("--strict",)),
        ("strict: false", ()),
        ("static-batch: true", ("--static-batch",)),
        ("verbose: 2", ("-vv",)),
        ("verbose: true", ("-v",)),
        ("warm-start: none", ("--warm-start", "none")),
        ("static-statistics: all", ("--static-statistics=all",)),
        ("leaf: a.b", ("--leaf", "a.b")),
        ("leaf: [a.b, c]", ("--leaf", "a.b", "--leaf", "c")),
        ("leaf: []", ()),
        ("input-shape: 1,3,8,8", SHAPE),
        ("input-shape: [1, 3, 8, 8]", SHAPE),
        ("input-shape:\n- [1, 3, 8, 8]\n- 1,5", (*SHAPE, "--input-shape", "1,5")),
        ("input: tokens:int64:1,128", ("--input", "tokens:int64:1,128")),
        ("mean: [0.5, 0.4]\nstd: '0.5,0.4'", ("--mean", "0.5,0.4", "--std", "0.5,0.4")),
        ("resize: [8, 9]\ncrop: 8", ("--resize", "8,9", "--crop", "8")),
        ("input-names: [a, b]\nname: 'null'", ("--input-names", "a,b", "--name", "null")),
        ("model: -m.pt\noutput: 1.onnx", ("-o", "1.onnx", "--", "-m.pt")),
    ],
)
def test_values_mean_what_they_say(text: str, typed: tuple[str, ...]) -> None:
    assert parsed(text) == typed_alone(*typed)


@pytest.mark.parametrize(
    ("text", "typed", "both"),
    [
        ("norm: group", ("--norm", "layer"), ("--norm", "layer")),
        ("proxy: false", ("--proxy",), ("--proxy",)),
        ("leaf: [a, b]", ("--leaf", "c"), ("--leaf", "c")),
        ("report: a.json", ("--report", "b.json"), ("--report", "b.json")),
        ("verbose: 2", ("-v",), ("-v",)),
        ("quiet: true", ("-v",), ("-v",)),
        ("input: x:1,3", SHAPE, SHAPE),
        ("model: a.pt\noutput: a.onnx\nopset: 18", ("b.pt",), ("b.pt", "-o", "a.onnx", "--opset", "18")),
        ("output: a.onnx\nnorm: group", ("--diagnose", "d"), ("--diagnose", "d", "--norm", "group")),
        ("mean: 0.5\nstd: 0.5", ("--mean", "0.4"), ("--mean", "0.4", "--std", "0.5")),
    ],
)  # fmt: skip
def test_what_is_typed_wins(text: str, typed: tuple[str, ...], both: tuple[str, ...]) -> None:
    assert parsed(text, *typed) == typed_alone(*both)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: b\nnrom: group", "there is no option 'a'"),
        (b"output: m\nnrom: group", "recipe.yaml, line 2: there is no option 'nrom' (did you mean norm?)"),
        (b"save-config: x", "there is no option 'save-config'"),
        (b"config: x", "there is no option 'config'"),
        (b"norm: grup", "did you mean group?"),
        (b"norm: 3", "there is no '3'"),
        (b"num-groups: four", "expected a positive number"),
        (b"num-groups: 4.5", "expected a positive number"),
        (b"num-groups: true", "expected a value, not true"),
        (b"num-groups: [1, 2]", "num-groups: expected one value, not a list"),
        (b"error-budget: -1", "expected a number of 0 or more"),
        (b"strict: maybe", "strict: expected true or false"),
        (b"strict: 2", "expected true or false"),
        (b"strict: [true]", "expected true or false"),
        (b"output: true", "expected a value, not true"),
        (b"output: ''", "the name is empty"),
        (b"norm: {group: 4}", "expected a value or a list of values, found a mapping"),
        (b"leaf: [[a]]", "expected a list of values, not of lists"),
        (b"input-shape: [1, 0]", "expected positive sizes"),
        (b"norm:", "norm has no value"),
        (b"norm: null", "norm has no value"),
        (b"norm: group\nnum-groups: 4\nnorm: layer", "line 3: norm is there twice, first in line 1"),
        (b"num-groups: 4\nnum_groups: 8", "num-groups is there twice"),
        (b"- norm\n- group", "found a list"),
        (b"norm group", "found a text"),
        (b"? [a]\n: b", "found a list as a name"),
        (b"", "holds no options"),
        (b"# norm: group\n", "holds no options"),
        (b"---\n...\n", "holds no options"),
        (b"null", "holds no options"),
        (b"norm: group\n---\nnorm: layer", "a second document begins"),
        (b"norm: !!python/object/apply:os.system ['touch hit']", "tags such as"),
        (b"!!python/name:os.system\nnorm: group", "tags such as"),
        (b"norm: !!str group", "tags such as"),
        (b"leaf: &a [x]\nallow: *a", "anchors and aliases"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]", "anchors and aliases"),
        (b"<<: *a", "anchors and aliases"),
        (b"leaf: " + b"[" * 100_000, "found a list"),
        (b"norm: 'group", "line 1: no YAML"),
        (b'norm: "\\UFFFFFFFF"', "no YAML"),
        (b"norm: group\n\tproxy: false", "no YAML"),
        (b"norm: gr\x00up", "no YAML"),
        (b"\x89PNG\r\n\x1a\n", "is not text in UTF-8"),
        ("norm: group".encode("utf-16"), "is not text in UTF-8"),
        (b"#" * (MOST_BYTES + 1), "is larger than 256 KiB"),
        (b"output: m.onnx", "the following arguments are required: model"),
        (b"model: model.pt", "-o/--output is required"),
        (b"model: m.pt\noutput: m.onnx\nquiet: true\nverbose: 1", "exclude each other"),
        (b"model: m.pt\noutput: m.onnx\nanchor: auto", "needs samples"),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_status_2(
    content: bytes, message: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert message in refusal(content, capsys)
    assert not (folder / "hit").exists()


def test_what_cannot_be_read_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(folder / "pipe")  # which nobody writes into: opening it would block
    with (folder / "huge.yaml").open("wb") as file:
        file.truncate(1 << 30)
    for name in ("missing.yaml", ".", "pipe", "huge.yaml", "/dev/zero", "model.pt", "a\0b"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["--config", name])
        assert caught.value.code == cli.USAGE
        assert capsys.readouterr().err.count("\n") == 1


def test_a_recipe_with_a_byte_order_mark_and_lines_of_windows() -> None:
    RECIPE.write_bytes(b"\xef\xbb\xbfnorm: group\r\nnum-groups: 4\r\n")
    assert parsed(RECIPE.read_bytes().decode()) == typed_alone("--norm", "group", "--num-groups", "4")


def test_a_recipe_is_there_whole_or_not_at_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes.save(parse(["--norm", "group"]), RECIPE)
    before = RECIPE.read_bytes()
    with pytest.raises(ExportError, match="there is no folder"):
        recipes.save(parse(["--norm", "layer"]), folder / "none" / "recipe.yaml")
    for name in ("none/r.yaml", "model.pt", "m.onnx", "recipe.yaml"):  # refused before the work
        status = cli.main(
            ["model.pt", "-o", "m.onnx", *SHAPE, "--config", "recipe.yaml", "--save-config", name]
        )
        assert (status, capsys.readouterr().err.count("\n")) == (cli.FAILED, 1)
    assert RECIPE.read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"model.pt", "recipe.yaml"}


def test_no_recipe_of_a_run_that_failed(folder: Path) -> None:
    assert cli.main(["missing.pt", "-o", "m.onnx", "--save-config", "recipe.yaml"]) == cli.FAILED
    assert not RECIPE.exists()
