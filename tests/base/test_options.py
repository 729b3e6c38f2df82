"""What a field of a stage's options says about itself."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from pn_compiler.base.config import DistillConfig, ExportConfig, FreezeConfig, RecoveryConfig
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.options import about, changed, check_kinds, options_of, pick, values


@dataclasses.dataclass(frozen=True)
class Oven:
    folder: Path = dataclasses.field(metadata=about("where the bread lies"))
    heat: Literal["top", "bottom"] = dataclasses.field(default="top", metadata=about("where it comes from"))
    door: Literal["open"] | None = dataclasses.field(default=None, metadata=about("of the oven", flag=""))
    minutes: int | None = dataclasses.field(default=None, metadata=about("of baking", flag="--time"))
    steam: bool = dataclasses.field(default=False, metadata=about("add steam"))
    own: float = 0.5

    def __post_init__(self) -> None:
        check_kinds(self)


def test_options_are_the_fields_with_help() -> None:
    found = options_of(Oven)
    assert [*found] == ["folder", "heat", "door", "minutes", "steam"]
    assert [option.kind for option in found.values()] == [Path, Literal, Literal, int, bool]
    assert [option.optional for option in found.values()] == [False, False, True, True, False]
    assert [option.flag for option in found.values()] == ["--folder", "--heat", "", "--time", "--steam"]
    assert found["heat"].choices == ("top", "bottom")
    assert found["folder"].default is dataclasses.MISSING


def test_options_are_picked_among_the_arguments_of_a_function() -> None:
    def bake(folder: Path, bread: str, *, heat: str = "bottom", own: float = 3) -> Oven:
        return pick(Oven, locals())

    oven = bake(Path("shelf"), "rye")
    assert oven == Oven(Path("shelf"), heat="bottom")  # `own` is no option
    assert values(oven) == {
        "folder": Path("shelf"), "heat": "bottom", "door": None, "minutes": None, "steam": False,
    }  # fmt: skip
    assert changed(oven) == ["folder", "heat"]


@pytest.mark.parametrize("wrong", [{"heat": "left"}, {"heat": None}, {"steam": "False"}, {"door": "ajar"}])
def test_flags_and_choices_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Oven(Path("shelf"), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "wrong", "message"),
    [
        (RecoveryConfig, {"distill_steps": -1}, "a number of steps"),
        (RecoveryConfig, {"distill_steps": True}, "a number of steps"),
        (RecoveryConfig, {"distill_logits": "all"}, "has no effect without distill_steps"),
        (RecoveryConfig, {"static_statistics": "some"}, "'auto', 'all'"),
        (RecoveryConfig, {"error_budget": float("nan")}, "an error of 0 or more"),
        (DistillConfig, {"lr": 0.0}, "a number above 0"),
        (DistillConfig, {"max_samples": 1}, "2 or more"),
        (FreezeConfig, {"held_out": 1.0}, "a share above 0 and below 1"),
        (FreezeConfig, {"budget": -0.1}, "an error of 0 or more"),
    ],
)
def test_impossible_options_of_the_recovery(stage: type, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage(**wrong)


def test_lists_of_names_are_kept_as_tuples() -> None:
    assert ExportConfig(input_names=["a"], output_names=[]) == ExportConfig(input_names=("a",))
