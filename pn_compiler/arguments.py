"""The arguments of the command ``pn-compile``."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pn_compiler.base.config import DistillConfig, ExportConfig, FreezeConfig, RecoveryConfig, TransformConfig
from pn_compiler.base.errors import ConfigError, printable
from pn_compiler.base.input_specs import InputSpec
from pn_compiler.base.option_checks import did_you_mean
from pn_compiler.base.options import Option, options_of
from pn_compiler.repository.options import ModelRepository

DATA_OPTIONS = ("mean", "std", "resize", "crop", "interpolation", "allow_data_code")


def _shape(text: str, example: str = "1,3,224,224") -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not sizes or any(size < 1 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive sizes such as {example}")
    return sizes


def _input(text: str) -> InputSpec:
    try:
        return InputSpec.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1
    if not 0 <= share < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of 0 or more, such as 0.01")
    return share


def _size(text: str) -> int | tuple[int, ...]:
    sizes = _shape(text, "256 or 192,256")
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one size, or height and width")
    return sizes if len(sizes) == 2 else sizes[0]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.replace(",", " ").split())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers such as 0.5,0.5,0.5") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


LISTS = (_shape, _size, _numbers, _names)  # of what is typed with commas between its parts


class _Version(argparse.Action):
    """Reads versions only when they are asked for: that takes as long as everything else in ``--help``."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import platform

        from pn_compiler.base.versions import versions

        others = versions()
        own = others.pop("pn-compiler")
        others["Python"] = platform.python_version()
        listed = ", ".join(f"{name} {version}" for name, version in others.items())
        sys.stdout.write(f"{parser.prog} {own}\nwith {listed}\n")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error, without the two screens of usage.

    Attributes:
        origin: what errors begin with: where the arguments are from, if not from the command line.
    """

    origin = ""

    def actions(self) -> list[argparse.Action]:
        """All arguments, in the order of the help."""
        return [*self._actions]

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As usual, with the nearest flag to one that is unknown."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = did_you_mean(flag, self._option_string_actions) if flag.startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """With the nearest choice to one that there is not."""
        if action.choices is not None and value not in action.choices:
            listed = ", ".join(map(str, action.choices))
            near = did_you_mean(value, map(str, action.choices))
            raise argparse.ArgumentError(action, f"there is no {value!r}: choose from {listed}{near}")

    def error(self, message: str) -> NoReturn:
        usage = f"usage: {self.prog} MODEL -o FILE, and {self.prog} --help for all options"
        self.exit(2, f"{self.prog}: error: {printable(self.origin + message)}; {usage}\n")


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def _file(text: str) -> Path:
    if text == "-":
        raise argparse.ArgumentTypeError("expected the name of a file, which is verified before it appears")
    return _path(text)


def make_parser() -> Parser:
    parser = Parser(
        prog="pn-compile",
        description="Compiles a PyTorch model with BatchNorm into a verified, batch-independent ONNX file.",
        epilog="A model file runs no code when it is loaded, unless you pass --unsafe-pickle; --arch, "
        "--allow, --metric and --allow-data-code import the packages that are named.",
    )
    parser.add_argument(
        "model", nargs="?", type=_path, help="model.pt, checkpoint or exported program (.pt2)"
    )
    parser.add_argument("-o", "--output", type=_file, metavar="FILE", help="the ONNX file to write")
    parser.add_argument(
        "--config", type=_path, metavar="RECIPE",
        help="read what is not typed from a YAML file, under the names of the flags, as norm: group",
    )  # fmt: skip
    parser.add_argument(
        "--save-config", type=_file, metavar="RECIPE", help="write such a file, with all that was given"
    )
    parser.add_argument(
        "--report", type=_path, action="append", default=[], metavar="FILE",
        help="write the report, too: a page if the name ends in .html, else JSON; - prints the JSON, and "
        "nothing else. May be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--node-data", type=_file, metavar="DIR",
        help="write what became of each BatchNorm for the nodes of the file, as Model Explorer shows it",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print the table of sites; write nothing but a report"
    )
    parser.add_argument(
        "--diagnose", metavar="DATA",
        help="print the power decomposition of each normalizer, before and after conversion, on samples",
    )  # fmt: skip
    parser.add_argument("--list-passes", action="store_true", help="print the pipeline and exit")
    parser.add_argument(
        "--plot", type=_file, metavar="FILE", help="draw what --diagnose found, as .png, .svg or .pdf"
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions and exit")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0,
        help="print the tables of sites and operators, and log; twice: log more",
    )  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")

    source = parser.add_argument_group("the model file")
    source.add_argument("--arch", metavar="PACKAGE.MODULE:FACTORY", help="makes the module of a state_dict")
    source.add_argument(
        "--allow", metavar="PACKAGE.MODULE.CLASS", action="append", default=[],
        help="a class that the file may use, beside those of torch.nn, torchvision and timm",
    )  # fmt: skip
    source.add_argument(
        "--checkpoint-key", metavar="KEY",
        help="the entry of a checkpoint that holds the weights, as state_dict_ema or state_dict.student",
    )  # fmt: skip
    source.add_argument(
        "--part", metavar="PATH",
        help="compile this submodule alone, such as the backbone of a detector, which has no file as a whole",
    )  # fmt: skip
    source.add_argument("--unsafe-pickle", action="store_true", help="let the file run any code it brings")
    source.add_argument(
        "--input-shape", type=_shape, action="append", metavar="N,C,H,W",
        help="shape of an input, batch included; once for each input. Default: from the file, else the "
        "channels of the first layer and 224 pixels",
    )  # fmt: skip

    source.add_argument(
        "--input", type=_input, action="append", metavar="[NAME:][DTYPE:]N,...", dest="inputs",
        help="the same with a dtype and the name of the parameter of forward, as tokens:int64:1,128",
    )  # fmt: skip

    _add_data_options(parser)

    add_options(parser.add_argument_group("conversion"), TransformConfig)
    recovery = parser.add_argument_group("accuracy and speed")
    recovery.add_argument(
        "--calibrate", metavar="DATA",
        help="fit weight and bias to unlabelled samples, or with --anchor auto the anchors; some hundred are "
        "enough",
    )  # fmt: skip
    add_options(recovery, RecoveryConfig)
    add_options(parser.add_argument_group("ONNX"), ExportConfig)
    add_options(parser.add_argument_group("serving"), ModelRepository)
    return parser


def add_options(group: argparse._ArgumentGroup, stage: type) -> None:
    """Adds the flags of the options that `stage` declares.

    They have no defaults here: what the user leaves out is not in the namespace, and the API has its own.
    """
    for option in options_of(stage).values():
        if option.flag:
            group.add_argument(
                option.flag, dest=option.name, default=argparse.SUPPRESS, help=_help(option), **_form(option)
            )


def _help(option: Option) -> str:
    stated = isinstance(option.default, str | float | int) and not isinstance(option.default, bool)
    return (
        f"{option.about.help} (default: {option.default})" if stated and option.default else option.about.help
    )


def _form(option: Option) -> dict[str, Any]:
    """How argparse reads the value of a flag, if it has one."""
    about = option.about
    if option.kind is bool and not option.default:
        return {"action": "store_true"}
    if option.kind is bool and about.flag:  # of another name, which says the opposite
        return {"action": "store_false"}
    if option.kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    form: dict[str, Any] = {"metavar": about.metavar} if about.metavar else {}
    if option.choices:
        form["choices"] = tuple(choice for choice in option.choices if choice not in about.implied)
        return form | ({"nargs": "?", "const": about.bare} if about.bare else {})
    if about.repeated:
        return form | {"action": "append"}
    if about.words:
        return form | {"type": lambda text: text if text in about.words else _TYPES[option.kind](text)}
    return form | {"type": _TYPES[option.kind]}


_TYPES: dict[Any, Callable[[str], Any]] = {
    int: _positive,
    float: _share,
    str: str,
    Path: _path,
    Sequence: _names,
}


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group(
        "data",
        "DATA is a file .npy, .npz or .safetensors of samples, preprocessed as for training; a folder of "
        "images, which are prepared as by torchvision's Resize, CenterCrop, ToTensor and Normalize; or "
        "package.module:function, which yields batches.",
    )
    data.add_argument(
        "--mean", type=_numbers, nargs="+", metavar="M",
        help="for each channel, of pixels on the scale 0 to 1, such as 0.485,0.456,0.406; goes with --std",
    )  # fmt: skip
    data.add_argument("--std", type=_numbers, nargs="+", metavar="S", help="for each channel, on that scale")
    data.add_argument("--resize", type=_size, metavar="N", help="pixels of the shorter side, or H,W")
    data.add_argument("--crop", type=_size, metavar="N", help="side of the centre that is kept, or H,W")
    data.add_argument(
        "--interpolation", choices=("bilinear", "bicubic"), help="of --resize (default: bilinear)"
    )
    data.add_argument("--allow-data-code", action="store_true", help="let DATA be package.module:function")


def check_usage(arguments: argparse.Namespace) -> None:
    """Ends the command with status 2 if what was asked for does not go together."""
    if arguments.model is None:
        make_parser().error("the following arguments are required: model")
    given = vars(arguments)
    if arguments.quiet and arguments.verbose:
        make_parser().error("--quiet and --verbose exclude each other")
    tasks = (arguments.output, given.get("directory"), arguments.diagnose)
    if not arguments.dry_run and all(task is None for task in tasks):
        make_parser().error("-o/--output is required (or --model-repository, --dry-run, or --diagnose)")
    _check_repository_usage(arguments)
    _check_samples(given)
    if arguments.inputs and arguments.input_shape:
        make_parser().error("--input describes all inputs: leave out --input-shape")
    _check_company(given)
    if arguments.node_data is not None and (arguments.dry_run or arguments.diagnose is not None):
        make_parser().error("--node-data is about the nodes of the file: leave out --dry-run and --diagnose")
    if arguments.diagnose is not None:
        _check_diagnosis_usage(given)
    elif arguments.plot is not None:
        make_parser().error("--plot draws what --diagnose finds: give --diagnose DATA, too")


def _check_samples(given: Mapping[str, Any]) -> None:
    """Refuses what needs DATA, or is about it, where there is none."""
    for name, flag in {"distill_steps": "--distill", "static_statistics": "--static-statistics"}.items():
        if name in given and given["calibrate"] is None:
            make_parser().error(f"{flag} needs samples: give --calibrate DATA")
    none = given["calibrate"] is None and given["diagnose"] is None
    if given.get("anchor") == "auto" and none:
        make_parser().error("--anchor auto needs samples: give --calibrate DATA, or a number, such as 0.75")
    about_data = [name for name in DATA_OPTIONS if given[name]]
    if about_data and none:
        flag = f"--{about_data[0].replace('_', '-')}"
        make_parser().error(f"{flag} is about DATA, and there is none: see --calibrate and --diagnose")


def _check_company(given: Mapping[str, Any]) -> None:
    """Refuses flags without those that they go with."""
    auto = given.get("anchor") == "auto"
    if "metric" in given and not auto and "distill_steps" not in given and "static_statistics" not in given:
        make_parser().error("--metric goes with --distill, --static-statistics or --anchor auto")
    if "anchor_budget" in given and not auto:
        make_parser().error("--anchor-budget goes with --anchor auto")
    if "distill_logits" in given and "distill_steps" not in given:
        make_parser().error("--distill-logits goes with --distill")
    if "error_budget" in given and given.get("static_statistics") != "auto":
        make_parser().error("--error-budget goes with --static-statistics=auto")
    if "tune" in given and given.get("target") != "auto":
        make_parser().error("--tune goes with --target auto")
    if "threads" in given and given.get("target") != "auto" and "benchmark" not in given:
        make_parser().error("--threads goes with --target auto or --benchmark")


def _check_diagnosis_usage(given: Mapping[str, Any]) -> None:
    clashes = {"output": "--output", "directory": "--model-repository", "dry_run": "--dry-run"}
    clashes |= {"input_shape": "--input-shape", "inputs": "--input", "calibrate": "--calibrate"}
    for flag in (flag for name, flag in clashes.items() if given.get(name)):
        make_parser().error(f"--diagnose writes no model and takes shapes from its data: leave out {flag}")


def _check_repository_usage(arguments: argparse.Namespace) -> None:
    given = [option for name, option in options_of(ModelRepository).items() if name in arguments]
    names = [option.name for option in given]
    if "directory" in names and "name" not in names:
        make_parser().error("--model-repository needs the name of the model: give --name NAME")
    if given and "directory" not in names:
        make_parser().error(f"{given[0].flag} goes with --model-repository")


_PAGE = """# Options

Each option is declared once, with its default and the phrase below, in `pn_compiler/base/config.py`, and
those of a model repository in `pn_compiler/repository/options.py`. The functions take their defaults from
there, and `pn-compile` its flags. A new option is a field there and a parameter of each function that has it;
the tests say what is missing. `python -m pn_compiler.arguments > docs/options.md` writes this page.
"""
_TITLES: dict[str, tuple[type, str]] = {
    "Conversion": (TransformConfig, "`transform`; all but `norm_only_bias` in `compile`"),
    "Recovery": (RecoveryConfig, "`compile`"),
    "Distillation": (DistillConfig, "`distill`"),
    "Static statistics": (FreezeConfig, "`freeze_statistics`"),
    "Export": (
        ExportConfig,
        "`export_onnx` and `compile`; all but `target`, `tune` and `threads` in `export_model_repository`",
    ),
    "Model repository": (ModelRepository, "`ModelRepository` and `export_model_repository`"),
}


def options_page() -> str:
    """What docs/options.md holds."""
    parts = [_PAGE]
    for title, (stage, functions) in _TITLES.items():
        rows = [_row(option) for option in options_of(stage).values()]
        head = ("option", "`pn-compile`", "default", "choices", "what it does")
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
        parts.append("\n".join([f"## {title}\n", f"Of {functions}.\n", *lines]) + "\n")
    return "\n".join(parts)


def _row(option: Option) -> tuple[str, ...]:
    default = "" if option.default is dataclasses.MISSING else f"`{option.default!r}`"
    both = option.kind is bool and option.default is True and option.about.flag is None
    flag = f"`{option.flag}`" if option.flag else ""
    flag += f", `--no-{option.flag.removeprefix('--')}`" if both else ""
    return f"`{option.name}`", flag, default, ", ".join(option.choices), option.about.help


if __name__ == "__main__":
    sys.stdout.write(options_page())
