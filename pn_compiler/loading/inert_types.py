"""Types of what training runs store beside the weights, which only hold values: options, paths, dates.

Making one neither reads a file nor calls anything; each has a rule for the form in which pickle writes it.
"""

import argparse
import collections
import datetime
import math
import os
import pathlib
import re
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch.torch_version import TorchVersion

from pn_compiler.loading.inert_pickle import Call, Name

_NUMBER = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)")  # dtypes of numpy that hold no objects
_ORDERS = ("<", ">", "=", "|")
_MULTIARRAY = ("numpy._core.multiarray", "numpy.core.multiarray")  # numpy 2 and 1
_ON_WINDOWS = os.name == "nt"
_MOST_TEXT = 4096  # characters of a path or version


def inert_type(name: str) -> Any:
    """The type or function that a pickle calls by `name` to make an inert value; None for all others."""
    return _TYPES[name][0] if name in _TYPES else None


def is_inert_call(call: Call) -> bool:
    """Whether a call of an inert type has the form in which pickle writes it."""
    if not isinstance(call.function, Name) or not isinstance(call.arguments, tuple):
        return False
    return call.function.path in _TYPES and _TYPES[call.function.path][1](call)


def extra_classes() -> list[tuple[type, str]]:
    """The classes of numpy's dtypes, which torch must know to give one its byte order."""
    classes = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdgFDG"}
    return [(cls, f"numpy.dtypes.{cls.__name__}") for cls in classes]


def _plain(call: Call) -> bool:
    return not call.new and call.state is None


def _of_texts(call: Call) -> bool:
    """Strings only, as in a path."""
    texts = all(isinstance(part, str) for part in call.arguments)
    return _plain(call) and texts and sum(map(len, call.arguments)) <= _MOST_TEXT


def _of_numbers(call: Call) -> bool:
    return _plain(call) and all(type(part) is int and abs(part) < 2**40 for part in call.arguments)


def _of_bytes(call: Call) -> bool:
    """The packed fields of a date or time, and perhaps a time zone."""
    if not _plain(call) or len(call.arguments) not in (1, 2):
        return False
    return _byte_count(call.arguments[0]) is not None and all(map(is_inert_call, call.arguments[1:]))


def _time_zone(call: Call) -> bool:
    if not _plain(call) or len(call.arguments) not in (1, 2):
        return False
    difference, *name = call.arguments
    return _is(difference, "datetime.timedelta") and all(isinstance(part, str) for part in name)


def _namespace(call: Call) -> bool:
    return call.arguments == () and isinstance(call.state, dict | None)


def _frozen_set(call: Call) -> bool:
    return _plain(call) and len(call.arguments) == 1 and isinstance(call.arguments[0], list)


def _counter(call: Call) -> bool:
    return _plain(call) and len(call.arguments) == 1 and isinstance(call.arguments[0], dict)


def _version(call: Call) -> bool:
    return call.new and call.state is None and len(call.arguments) == 1 and isinstance(call.arguments[0], str)


# numpy ---------------------------------------------------------------------------------------------


def _dtype(call: Call) -> bool:
    """``dtype("f8", False, True)``, a copy, which is then given its byte order."""
    if call.new or len(call.arguments) != 3 or call.arguments[1:] != (False, True):
        return False
    kind, state = call.arguments[0], call.state
    plain = isinstance(kind, str) and _NUMBER.fullmatch(kind) and isinstance(state, tuple) and len(state) == 8
    return bool(plain) and state[0] == 3 and state[1] in _ORDERS and state[2:] == _NO_FIELDS


_NO_FIELDS = (None, None, None, -1, -1, 0)


def _scalar(call: Call) -> bool:
    if not _plain(call) or len(call.arguments) != 2:
        return False
    dtype, raw = call.arguments
    return _is(dtype, "numpy.dtype") and _byte_count(raw) == _item_bytes(dtype)


def _array(call: Call) -> bool:
    """An empty array, which is then given its shape, dtype and bytes."""
    if len(call.arguments) != 3 or call.new or not isinstance(call.state, tuple) or len(call.state) != 5:
        return False
    kind, empty, _ = call.arguments
    version, shape, dtype, order, raw = call.state
    fine = isinstance(kind, Name) and kind.path == "numpy.ndarray" and empty == (0,) and version == 1
    if not fine or type(order) is not bool or not _is(dtype, "numpy.dtype"):
        return False
    sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    return sizes and _byte_count(raw) == math.prod(shape) * _item_bytes(dtype)


def _item_bytes(dtype: Call) -> int:
    return int(np.dtype(dtype.arguments[0]).itemsize)


def _is(value: Any, name: str) -> bool:
    """Whether `value` is an inert call of `name`."""
    fine = isinstance(value, Call) and isinstance(value.function, Name) and value.function.path == name
    return fine and is_inert_call(value)


def _byte_count(value: Any) -> int | None:
    """The length of bytes as protocol 2 writes them, text in latin1; None for anything else."""
    if not isinstance(value, Call) or not isinstance(value.function, Name) or not _plain(value):
        return None
    if value.function.path == "builtins.bytes":
        return 0 if value.arguments == () else None
    if value.function.path != "_codecs.encode" or not isinstance(value.arguments, tuple):
        return None
    text, encoding = value.arguments if len(value.arguments) == 2 else (None, None)
    return len(text) if isinstance(text, str) and encoding == "latin1" else None


_Rule = Callable[[Call], bool]


def _all(names: Iterable[str], made: Any, rule: _Rule) -> dict[str, tuple[Any, _Rule]]:
    return dict.fromkeys(names, (made, rule))


_PATHS: dict[str, Any] = {  # those of another system as what does no more than to hold them
    "PosixPath": pathlib.PurePosixPath if _ON_WINDOWS else pathlib.PosixPath,
    "WindowsPath": pathlib.WindowsPath if _ON_WINDOWS else pathlib.PureWindowsPath,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}
try:
    _MAKERS: Any = np._core.multiarray  # type: ignore[attr-defined]
except AttributeError:  # numpy 1
    _MAKERS = np.core.multiarray  # type: ignore[attr-defined]

#: Name -> (what torch calls for it, the rule for the call).
_TYPES: dict[str, tuple[Any, _Rule]] = {
    "argparse.Namespace": (argparse.Namespace, _namespace),
    "types.SimpleNamespace": (types.SimpleNamespace, _namespace),
    **{f"{module}.{name}": (path, _of_texts)
       for module in ("pathlib", "pathlib._local") for name, path in _PATHS.items()},
    "datetime.datetime": (datetime.datetime, _of_bytes),
    "datetime.date": (datetime.date, _of_bytes),
    "datetime.time": (datetime.time, _of_bytes),
    "datetime.timedelta": (datetime.timedelta, _of_numbers),
    "datetime.timezone": (datetime.timezone, _time_zone),
    "builtins.frozenset": (frozenset, _frozen_set),
    "builtins.bytes": (bytes, lambda call: _byte_count(call) == 0),
    "collections.Counter": (collections.Counter, _counter),
    "torch.torch_version.TorchVersion": (TorchVersion, _version),
    "numpy.dtype": (np.dtype, _dtype),
    "numpy.ndarray": (np.ndarray, lambda call: False),  # a part of what builds one
    **_all((f"{module}.scalar" for module in _MULTIARRAY), _MAKERS.scalar, _scalar),
    **_all((f"{module}._reconstruct" for module in _MULTIARRAY), _MAKERS._reconstruct, _array),
}  # fmt: skip
