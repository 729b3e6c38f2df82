"""A recipe: a file with what would be typed after ``pn-compile``, under the names of the flags."""

import argparse
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pn_compiler.arguments import LISTS, Parser, make_parser
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.files import write_atomically
from pn_compiler.base.input_specs import InputSpec
from pn_compiler.base.option_checks import did_you_mean
from pn_compiler.base.recipe_file import Entry, Value, read_recipe, write_recipe

_NOT_IN_A_RECIPE = frozenset(["help", "version", "list_passes", "config", "save_config"])
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_OUTPUTS = ("output", "directory", "name", "force", "max_batch_size")
#: what is typed -> what of the recipe it stands for, because the two exclude each other
_INSTEAD_OF: dict[str, tuple[str, ...]] = {
    "quiet": ("verbose",),
    "verbose": ("quiet",),
    "inputs": ("input_shape",),
    "input_shape": ("inputs",),
    "diagnose": ("dry_run", "input_shape", "inputs", "calibrate", "node_data", *_OUTPUTS),
    "dry_run": ("node_data",),
    "output": ("diagnose", "plot"),
}


def complete(arguments: argparse.Namespace) -> argparse.Namespace:
    """`arguments` as they were typed, with the options of the recipe that they name under them.

    Ends the command with status 2 if the recipe is wrong.
    """
    parser = make_parser()
    left_out = _left_out(parser)
    typed, recipe = _given(arguments, left_out), _read(parser, arguments.config)
    for name in typed:
        for other in _INSTEAD_OF.get(name, ()):
            recipe.pop(other, None)
    return argparse.Namespace(**left_out | recipe | typed)


def save(arguments: argparse.Namespace, path: Path) -> None:
    """Writes a recipe with all that `arguments` say; what they leave out has its default there, too.

    Raises:
        ExportError: the file cannot be written.
    """
    parser = make_parser()
    given, actions = _given(arguments, _left_out(parser)), _actions(parser)
    values = {
        name: _plain(action, given[action.dest]) for name, action in actions.items() if action.dest in given
    }
    version = importlib.metadata.version("pn-compiler")
    comments = (
        f"of pn-compile {version}; run it with: pn-compile --config {path.name}",
        "names of files are relative to the folder where it runs",
    )
    write_atomically(path, write_recipe(values, comments).encode())


def _left_out(parser: Parser) -> dict[str, Any]:
    """The values of arguments that nobody gave."""
    return dict(vars(parser.parse_args([])))


def _given(arguments: argparse.Namespace, left_out: Mapping[str, Any]) -> dict[str, Any]:
    """What was given: no flag can be given with the value that stands for its absence."""
    names = vars(arguments)
    return {name: value for name, value in names.items() if name not in left_out or value != left_out[name]}


def _actions(parser: Parser) -> dict[str, argparse.Action]:
    """What has a place in a recipe, by name, in the order of the help."""
    return {
        next((flag[2:] for flag in action.option_strings if flag.startswith("--")), action.dest): action
        for action in parser.actions()
        if action.dest not in _NOT_IN_A_RECIPE
    }


def _read(parser: Parser, path: Path) -> dict[str, Any]:
    """What the recipe at `path` gives, by the names of arguments."""
    found: dict[str, Any] = {}
    try:
        entries = read_recipe(path)
    except ConfigError as error:
        parser.error(str(error))
    actions, left_out = _actions(parser), _left_out(parser)
    for name, entry in entries.items():
        parser.origin = f"{path}, line {entry.line}: "
        if name not in actions:
            parser.error(f"there is no option {name!r:.60}{did_you_mean(name, actions)}")
        try:
            words = _words(actions[name], entry)
        except ConfigError as error:
            parser.error(f"{name}: {error}")
        found |= _given(parser.parse_args(words), left_out)
    parser.origin = ""
    return found


def _words(action: argparse.Action, entry: Entry) -> list[str]:
    """`entry` as it would be typed."""
    if action.nargs == 0:
        return _switch(action, entry.value)
    texts = _texts(action, entry.value)
    if not entry.quoted and entry.value in ("true", "false"):
        raise ConfigError(f"expected a value, not {entry.value}")
    if not action.option_strings:
        return ["--", *texts]
    return [f"{action.option_strings[-1]}={text}" for text in texts]


def _switch(action: argparse.Action, value: Value) -> list[str]:
    text = value.lower() if isinstance(value, str) else ""
    if isinstance(action, argparse._CountAction) and text in ("1", "2", "3"):
        return [action.option_strings[-1]] * int(text)
    if text not in _SWITCHES:
        raise ConfigError("expected true or false")
    if isinstance(action, argparse.BooleanOptionalAction):
        return [action.option_strings[0 if _SWITCHES[text] else -1]]
    return [action.option_strings[-1]] if _SWITCHES[text] else []


def _texts(action: argparse.Action, value: Value) -> list[str]:
    """The value of each time that the flag would be typed."""
    if isinstance(value, str):
        return [value]
    listed = action.type in LISTS
    if isinstance(action, argparse._AppendAction) and not (listed and _is_one(value)):
        return [_joined(part) if listed else _one(part) for part in value]
    if not listed:
        raise ConfigError("expected one value, not a list")
    return [_joined(value)] if value else []


def _is_one(value: list[Value]) -> bool:
    """Whether these are sizes of one shape, not shapes."""
    return all(isinstance(part, str) and part.isdecimal() for part in value)


def _joined(value: Value) -> str:
    return value if isinstance(value, str) else ",".join(map(_one, value))


def _one(value: Value) -> str:
    if not isinstance(value, str):
        raise ConfigError("expected a list of values, not of lists")
    return value


def _plain(action: argparse.Action, value: Any) -> Any:
    """`value` as a recipe has it."""
    if isinstance(action, argparse._StoreFalseAction):
        return True  # the flag was given
    if isinstance(action, argparse._AppendAction) and len(value) == 1:
        return _yaml(value[0])
    if action.nargs == "+":
        return [_yaml(part) for parts in value for part in parts]
    return _yaml(value)


def _yaml(value: Any) -> Any:
    if isinstance(value, Path | InputSpec):
        return str(value)
    return [_yaml(part) for part in value] if isinstance(value, list | tuple) else value
