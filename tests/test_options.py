"""One declaration of each option: the functions, the command and the docs agree with it."""

import argparse
import dataclasses
import inspect
import os
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from torch import nn

import pn_compiler
from pn_compiler.arguments import make_parser, options_page
from pn_compiler.base.config import (
    DistillConfig,
    DType,
    ExportConfig,
    FreezeConfig,
    RecoveryConfig,
    TargetName,
    TransformConfig,
)
from pn_compiler.base.options import Option, changed, options_of
from pn_compiler.export import TARGETS, ExportOptions, Report
from pn_compiler.export.rewrites.half import DTYPES
from pn_compiler.export.to_onnx import Lowered
from pn_compiler.freezing.freeze_report import FreezeReport
from pn_compiler.pipeline.fidelity import Fidelity
from pn_compiler.recovery.distillation import DistillReport
from pn_compiler.repository.options import ModelRepository
from pn_compiler.stages import Network, Recovered, Traced

ROOT = Path(__file__).parent.parent

MODEL_AND_DATA = {"model", "path", "example_inputs", "example_kwargs", "progress"}  # no settings
#: function -> the stages whose options it has, and its other parameters
FUNCTIONS: dict[Callable[..., Any], tuple[tuple[type, ...], set[str]]] = {
    pn_compiler.transform: ((TransformConfig,), {"calibration", "pipeline"}),
    pn_compiler.compile: (
        (TransformConfig, RecoveryConfig, ExportConfig),
        {"calibration", "input_shape", "repository"},
    ),
    pn_compiler.export_onnx: ((ExportConfig,), {"repository"}),
    pn_compiler.export_model_repository: ((ModelRepository, ExportConfig), set()),
    pn_compiler.distill: ((DistillConfig,), {"teacher", "batches", "loss", "checkpoint"}),
    pn_compiler.freeze_statistics: ((FreezeConfig,), {"calibration"}),
}
#: (function, option) -> why it does not have that option of its stages
LEFT_OUT = {
    (pn_compiler.compile, "norm_only_bias"): "it is about networks to be trained from scratch, not exported",
    (pn_compiler.export_model_repository, "target"): "servers load a repository on any machine",
    (pn_compiler.export_model_repository, "tune"): "it chooses a target",
    (pn_compiler.export_model_repository, "threads"): "it is for what is measured",
}
#: parameter of `compile` -> why it has no flag of its name and default
ONLY_IN_PYTHON = {
    "model": "the command loads it from a file",
    "path": "--output",
    "example_inputs": "--input-shape, or those of the exported program",
    "example_kwargs": "the command calls a model by position",
    "input_shape": "--input-shape takes the shapes of several inputs",
    "calibration": "--calibrate reads it from DATA",
    "repository": "each option of a repository has its own flag",
    "progress": "the command shows a bar",
}
#: flag -> why `compile` has no such parameter
ONLY_IN_THE_COMMAND = {
    "--help": "about the command",
    "--version": "about the command",
    "--verbose": "about the command",
    "--list-passes": "about the command",
    "--output": "the parameter path",
    "--config": "about the command: what is typed, in a file",
    "--save-config": "about the command: what is typed, in a file",
    "--report": "the report is returned",
    "--plot": "Diagnosis.plot",
    "--quiet": "about the command",
    "--dry-run": "transform and sites",
    "--diagnose": "diagnose",
    "--arch": "about the model file",
    "--allow": "about the model file",
    "--checkpoint-key": "about the model file",
    "--part": "model.get_submodule",
    "--unsafe-pickle": "about the model file",
    "--input-shape": "the parameters example_inputs and input_shape",
    "--input": "the parameters example_inputs and example_kwargs",
    "--calibrate": "the parameter calibration",
    "--mean": "about DATA",
    "--std": "about DATA",
    "--resize": "about DATA",
    "--crop": "about DATA",
    "--interpolation": "about DATA",
    "--node-data": "a file, like the report: reporting.node_data.write_node_data",
    "--allow-data-code": "about DATA",
}
COMMAND = (TransformConfig, RecoveryConfig, ExportConfig, ModelRepository)


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def actions() -> dict[str, argparse.Action]:
    """The flag, "--no-..." aside, -> what argparse knows of it."""
    found = {}
    for action in make_parser()._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        found |= {names[0]: action} if names else {}
    return found


def declared(*stages: type) -> dict[str, Option]:
    return {name: option for stage in stages for name, option in options_of(stage).items()}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_has_the_options_of_its_stages_and_their_defaults(function: Callable[..., Any]) -> None:
    stages, others = FUNCTIONS[function]
    options = declared(*stages)
    left_out = {name for where, name in LEFT_OUT if where is function}
    assert left_out <= options.keys()
    own = {name: p for name, p in parameters(function).items() if name not in MODEL_AND_DATA | others}
    assert own.keys() == options.keys() - left_out
    for name, parameter in own.items():
        default = options[name].default
        missing = default is dataclasses.MISSING
        assert parameter.default == (inspect.Parameter.empty if missing else default), name
        assert missing or parameter.kind is inspect.Parameter.KEYWORD_ONLY, name


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_takes_the_types_that_its_stages_declare(function: Callable[..., Any]) -> None:
    wider = {"leaves": Sequence[str | type[nn.Module]], "directory": str | os.PathLike[str]}
    for stage in FUNCTIONS[function][0]:
        hints = typing.get_type_hints(stage)
        for name in options_of(stage).keys() & parameters(function).keys():
            assert parameters(function)[name].annotation == wider.get(name, hints[name]), name


def test_the_command_offers_what_compile_does() -> None:
    """Each flag is an option of `compile`, or of the repository that it takes, or stands in the list."""
    options = declared(*COMMAND)
    by_flag = {option.flag: name for name, option in options.items() if option.flag}
    assert actions().keys() - by_flag.keys() == ONLY_IN_THE_COMMAND.keys()
    assert parameters(pn_compiler.compile).keys() - by_flag.values() == ONLY_IN_PYTHON.keys()
    without_flag = {name for name, option in options.items() if not option.flag}
    assert without_flag == {name for where, name in LEFT_OUT if where is pn_compiler.compile}


def test_the_command_has_no_defaults_of_its_own() -> None:
    left_out = vars(make_parser().parse_args(["model.pt", "-o", "m.onnx"]))
    assert not left_out.keys() & declared(*COMMAND).keys()


def test_the_command_offers_the_same_choices() -> None:
    for option in declared(*COMMAND).values():
        if option.flag and option.choices:
            offered = tuple(actions()[option.flag].choices or ())
            assert offered == tuple(c for c in option.choices if c not in option.about.implied), option.name
    implied = {choice for option in declared(*COMMAND).values() for choice in option.about.implied}
    assert implied == {"calibrate"}  # by --calibrate DATA


def test_the_help_states_the_defaults() -> None:
    text = " ".join(make_parser().format_help().split())
    for default in ("activation", "auto", "0.01", "portable", "float32", "32"):
        assert f"(default: {default})" in text


#: what a user types -> the option that `compile` gets
TYPED: dict[tuple[str, ...], tuple[str, Any]] = {
    ("--norm", "group"): ("norm", "group"),
    ("--num-groups", "4"): ("num_groups", 4),
    ("--anchor", "0.5"): ("anchor", 0.5),
    ("--anchor", "auto"): ("anchor", "auto"),
    ("--anchor-budget", "0.1"): ("anchor_budget", 0.1),
    ("--no-proxy",): ("proxy", False),
    ("--proxy-padding", "output"): ("proxy_padding", "output"),
    ("--warm-start", "none"): ("warm_start", "none"),
    ("--leaf", "a.b", "--leaf", "c"): ("leaves", ["a.b", "c"]),
    ("--strict",): ("strict", True),
    ("--distill", "150"): ("distill_steps", 150),
    ("--distill-logits", "all"): ("distill_logits", "all"),
    ("--static-statistics",): ("static_statistics", "auto"),
    ("--static-statistics=all",): ("static_statistics", "all"),
    ("--error-budget", "0.5"): ("error_budget", 0.5),
    ("--benchmark",): ("benchmark", True),
    ("--allow-batch-dependent",): ("allow_batch_dependent", True),
    ("--metric", "my.metrics:accuracy"): ("metric", "my.metrics:accuracy"),
    ("--target", "openvino"): ("target", "openvino"),
    ("--tune",): ("tune", True),
    ("--threads", "3"): ("threads", 3),
    ("--opset", "18"): ("opset_version", 18),
    ("--target-ort", "1.18"): ("target_ort", "1.18"),
    ("--static-batch",): ("dynamic_batch", False),
    ("--dynamic", "H,W"): ("dynamic_axes", ("H", "W")),
    ("--input-names", "a,b"): ("input_names", ("a", "b")),
    ("--output-names", "c"): ("output_names", ("c",)),
    ("--dtype", "float16"): ("dtype", "float16"),
    ("--external-data",): ("external_data", True),
    ("--no-verify",): ("verify", False),
    ("--verify",): ("verify", True),
    ("--model-repository", "models"): ("directory", Path("models")),
    ("--name", "net"): ("name", "net"),
    ("--force",): ("force", True),
    ("--max-batch-size", "4"): ("max_batch_size", 4),
}


@pytest.mark.parametrize("typed", TYPED, ids=" ".join)
def test_what_is_typed_is_what_the_option_gets(typed: tuple[str, ...]) -> None:
    given = vars(make_parser().parse_args(["model.pt", *typed]))
    assert {name: given[name] for name in given.keys() & declared(*COMMAND).keys()} == dict([TYPED[typed]])


def test_every_flag_of_an_option_is_typed_above() -> None:
    tested = {name for name, _ in TYPED.values()}
    assert tested == {name for name, option in declared(*COMMAND).items() if option.flag}


def test_the_choices_are_those_that_the_export_knows() -> None:
    assert (*TARGETS, "auto") == get_args(TargetName)
    assert tuple(DTYPES) == get_args(DType)


def test_an_export_option_is_declared_once() -> None:
    assert options_of(ExportOptions) == options_of(ExportConfig)


@pytest.mark.parametrize(
    "stage", [TransformConfig, RecoveryConfig, DistillConfig, FreezeConfig, ExportOptions]
)
def test_the_options_of_a_stage_cannot_be_changed(stage: type) -> None:
    options = stage()
    for name in options_of(stage):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, name, getattr(options, name))


def test_results_of_stages_cannot_be_changed() -> None:
    for result in (Report, Lowered, Traced, Recovered, Network, DistillReport, FreezeReport, Fidelity):
        assert result.__dataclass_params__.frozen, result  # type: ignore[attr-defined]


def test_a_list_is_kept_as_it_was_given() -> None:
    names, leaves = ["image"], ["a"]
    export, transform = ExportOptions(input_names=names), TransformConfig(leaves=leaves)
    names.append("b")
    leaves.append("b")
    assert (export.input_names, transform.leaves) == (("image",), ("a",))


def test_changed_options_are_those_without_their_default() -> None:
    assert changed(ExportConfig()) == []
    assert changed(ExportConfig(input_names=[], dynamic_batch=False, opset_version=20)) == [
        "opset_version",
        "dynamic_batch",
    ]


def test_the_docs_list_what_is_declared() -> None:
    written = (ROOT / "docs" / "options.md").read_text()
    assert written == options_page(), "python -m pn_compiler.arguments > docs/options.md"


def test_the_command_answers_without_torch() -> None:
    """Neither its help nor wrong usage waits for the import of torch."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnx'] = None\n"
        "from pn_compiler.cli import main; main(sys.argv[1:])"
    )
    for arguments, status in ((["--help"], 0), (["--version"], 0), (["model.pt", "--norm", "batch"], 2)):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
