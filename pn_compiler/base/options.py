"""Options of a stage as fields of a dataclass, from which signatures, the command and the docs take them."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from pn_compiler.base.option_checks import check_flags, one_of

Stage = TypeVar("Stage")


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """What the command and the docs say of an option, besides its name, type and default.

    Attributes:
        help: what it does, as a phrase without a full stop.
        flag: of ``pn-compile``, if it is not the name of the option; "" if it has none.
        metavar: stands for the value in the help.
        bare: the value of the flag where it is given without one.
        repeated: whether the flag is given once for each value.
        implied: choices that the flag does not have, because another flag implies them.
        words: what the flag takes besides numbers.
    """

    help: str
    flag: str | None = None
    metavar: str | None = None
    bare: str | None = None
    repeated: bool = False
    implied: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """An option as its dataclass declares it.

    Attributes:
        kind: bool, int, float, str, Literal or another class; int for "int | None", and the first of several.
        choices: of a Literal.
        optional: whether None is a value.
        default: ``dataclasses.MISSING`` if it must be given.
    """

    name: str
    kind: Any
    choices: tuple[str, ...]
    optional: bool
    default: Any
    about: About

    @property
    def flag(self) -> str:
        """Of ``pn-compile``; "" if it has none."""
        return f"--{self.name.replace('_', '-')}" if self.about.flag is None else self.about.flag


def about(help: str, **details: Any) -> dict[str, About]:  # noqa: A002  # as argparse calls it
    """The metadata that makes a field an option: see `About`."""
    return {"about": About(help, **details)}


def options_of(stage: Any) -> dict[str, Option]:
    """The options that the dataclass `stage` declares, by name."""
    hints = typing.get_type_hints(stage)
    return {
        field.name: _option(field, hints[field.name])
        for field in dataclasses.fields(stage)
        if "about" in field.metadata
    }


def _option(field: "dataclasses.Field[Any]", hint: Any) -> Option:
    union = get_origin(hint) in (types.UnionType, typing.Union)
    optional = union and type(None) in get_args(hint)
    if optional:
        hint = next(part for part in get_args(hint) if part is not type(None))
    elif union:
        hint = get_args(hint)[0]  # what the command takes; Python takes the others, too
    kind = get_origin(hint) or hint
    choices = get_args(hint) if kind is Literal else ()
    return Option(field.name, kind, choices, optional, field.default, field.metadata["about"])


def pick(stage: type[Stage], arguments: Mapping[str, Any]) -> Stage:
    """The options of `stage` among the arguments of a function.

    A public function spells its options in its signature, where users see them, and nowhere else: its first
    line is ``pick(Stage, locals())``. An option that it does not have keeps its default.
    """
    return stage(**{name: arguments[name] for name in options_of(stage) if name in arguments})


def check_kinds(options: Any) -> None:
    """Raises ConfigError if a flag among `options` is neither True nor False, or a choice is none."""
    for name, option in options_of(type(options)).items():
        value = getattr(options, name)
        if option.kind is bool:
            check_flags(**{name: value})
        elif option.choices and not (option.optional and value is None):
            one_of(name, value, option.choices)


def freeze_lists(options: Any) -> None:
    """Makes tuples of the lists among `options`, which then equal the defaults where they are empty."""
    for name, value in values(options).items():
        if isinstance(value, list):
            object.__setattr__(options, name, tuple(value))


def values(options: Any) -> dict[str, Any]:
    """The value of each of `options`, by name, as arguments of a function that has them all."""
    return {name: getattr(options, name) for name in options_of(type(options))}


def stated(*stages: Any) -> dict[str, Any]:
    """The value of each option of `stages`, by name, as JSON can hold it; functions and classes by name."""
    found = {name: value for stage in stages for name, value in values(stage).items()}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def changed(options: Any) -> list[str]:
    """The names of the options that do not have their default."""
    declared = options_of(type(options))
    return [name for name, value in values(options).items() if value != declared[name].default]
