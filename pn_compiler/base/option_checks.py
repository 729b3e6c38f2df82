"""Whether options of the public functions have possible values: each error names its option."""

import difflib
import math
import numbers
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from pn_compiler.base.errors import ConfigError

FUNCTION_NAME = re.compile(r"[\w.]+:[\w.]+")  # package.module:function


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ConfigError if the option `name` has a `value` that is none of its `choices`."""
    if not isinstance(value, str) or value not in choices:
        expected = f"one of {', '.join(map(repr, choices))}{did_you_mean(value, choices)}"
        raise _impossible(name, value, expected)


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """The one of `choices` that is nearest to `value`, as the end of a message; empty if none is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(value.lower(), by_lower, 1) if isinstance(value, str) else []
    return f" (did you mean {by_lower[near[0]]}?)" if near else ""


def check_flags(**flags: object) -> None:
    """Raises ConfigError if one is neither True nor False: the text "False" would count as true."""
    for name, value in flags.items():
        if not _is_flag(value):
            raise _impossible(name, value, "True or False")


def _is_flag(value: object) -> bool:
    numpy = sys.modules.get("numpy")  # one of its values is only there if it was imported
    return isinstance(value, bool) or (numpy is not None and isinstance(value, numpy.bool_))


def check_number(
    name: str, value: Any, expected: str, low: float, high: float = math.inf, *, whole: bool = False
) -> None:
    """Raises ConfigError unless `value` is a number, or a `whole` one, with low <= value < high."""
    if not is_number(value, low, high, whole=whole):
        raise _impossible(name, value, expected)


def is_number(value: Any, low: float, high: float, *, whole: bool = False) -> bool:
    """Whether `value` is a number, or a `whole` one, with low <= value < high."""
    kind = numbers.Integral if whole else numbers.Real
    fits = isinstance(value, kind) and not isinstance(value, bool)
    return fits and bool(low <= value < high)


def check_function(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is None or can be called; a class, which makes objects, cannot."""
    if value is not None and (not callable(value) or isinstance(value, type)):
        raise _impossible(name, value, "a function, or None")


def check_metric(value: object) -> None:
    """Raises ConfigError unless `value` is None, can be called, or is the name of a function."""
    function = callable(value) and not isinstance(value, type)
    if value is not None and not function and not _is_function_name(value):
        raise _impossible("metric", value, "a function of outputs and labels, or package.module:function")


def _is_function_name(value: object) -> bool:
    """Whether `value` has the form ``package.module:function``."""
    return isinstance(value, str) and bool(FUNCTION_NAME.fullmatch(value))


def check_path(name: str, value: object) -> None:
    """Raises ConfigError unless `value` names a file or folder."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise _impossible(name, value, "the name of a file or folder")


def _impossible(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{name}={value!r:.80}: expected {expected}")
