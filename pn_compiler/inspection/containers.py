"""Tracks Python objects that outlive a call, to see whether a forward changed them."""

import array
import collections
import copy
import dataclasses
import sys
import types
import warnings
from collections.abc import Iterable
from typing import Any

from pn_compiler.inspection.captured import CONTAINERS, is_library, is_plain_object, reachable

#: ids of builtins and of their stand-ins during a trace: these do not count as changed globals
SWAPPED = {id(isinstance), id(callable), id(type)}

_WARNED = "__warningregistry__"  # what `warnings` keeps among the globals of code that warns
_BYTES = (bytearray, array.array)


class Containers:
    """A snapshot of lists, dicts, sets, arrays, objects and closure cells, to detect changes and undo them.

    For iterators it detects that they advanced, which cannot be undone.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[Any, Any]] = {}
        self._owners: dict[int, set[str]] = {}

    def add(self, values: Iterable[Any], owner: str) -> None:
        """Includes everything reachable from `values`; `owner` is the path of the module that holds them."""
        for value in reachable(values):
            if _is_held(value) or is_plain_object(value):
                self._note(value, owner)
            elif isinstance(value, types.FunctionType):
                for cell in value.__closure__ or ():
                    self._note(cell, owner)

    def add_globals(self, names: dict[str, Any]) -> None:
        """Includes the globals of a module and the containers among them."""
        if id(names) in self._held:
            return
        self._note(names, "")
        values = (value for name, value in names.items() if name != _WARNED)
        self.add([value for value in values if _is_held(value)], "")

    def add_classes(self, cls: type, owner: str) -> None:
        """Includes the attributes of the user's classes that `cls` derives from."""
        for base in cls.__mro__:
            if not is_library(base):
                self._note(base, owner)
                self.add([value for value in vars(base).values() if _is_held(value)], owner)

    def _note(self, value: Any, owner: str) -> None:
        self._held.setdefault(id(value), (value, _contents(value)))
        self._owners.setdefault(id(value), set()).add(owner)

    def changed(self) -> set[str]:
        """Paths of the modules that hold something that has changed; "" for globals."""
        keys = (key for key, (value, before) in self._held.items() if not _same(_contents(value), before))
        return {owner for key in keys for owner in self._owners[key]}

    def restore(self) -> None:
        """Undoes the changes."""
        for value, before in self._held.values():
            if not _same(_contents(value), before):
                _set_contents(value, before)


def _is_held(value: Any) -> bool:
    return isinstance(value, (*CONTAINERS, *_BYTES)) or _is_array(value) or _is_iterator(value)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_iterator(value: Any) -> bool:
    return hasattr(type(value), "__next__") and is_library(type(value))


@dataclasses.dataclass(frozen=True, slots=True)
class _Mark:
    """A fingerprint of the state of an iterator or an array."""

    state: Any


def _position(value: Any) -> Any:
    """The position of an iterator, to be compared by ==."""
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return None if frame is None else (frame.f_lasti, {k: id(v) for k, v in frame.f_locals.items()})
    if isinstance(value, tuple):
        return tuple(map(_position, value))
    if isinstance(value, list):  # what a dict's iterator has before it
        return len(value)
    if not _is_iterator(value):
        return value if isinstance(value, int | float | str | range) else type(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from Python 3.14 on, those of itertools do not tell
            return _position(value.__reduce__()[1:])
    except Exception:  # such as files
        return None


def _contents(value: Any) -> Any:
    if _is_iterator(value):
        return _Mark(_position(value))
    if isinstance(value, _BYTES) or _is_array(value):
        return _Mark(bytes(value) if isinstance(value, bytearray) else value.tobytes())
    if isinstance(value, types.CellType):
        try:
            return [value.cell_contents]
        except ValueError:
            return []
    if isinstance(value, dict) and ("__builtins__" in value or _WARNED in value):  # the globals of a module
        return {name: held for name, held in value.items() if name != _WARNED and id(held) not in SWAPPED}
    if isinstance(value, dict):
        return dict(dict.items(value))  # bypasses what a subclass does when it is read
    return copy.copy(value) if isinstance(value, CONTAINERS) else dict(vars(value))


def _same(now: Any, before: Any) -> bool:
    if isinstance(before, _Mark):
        return bool(now == before)
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(key in now and now[key] is value for key, value in before.items())
    if isinstance(now, set):
        return bool(now == before)
    return all(new is old for new, old in zip(now, before, strict=True))


def _set_contents(value: Any, before: Any) -> None:
    if isinstance(value, types.CellType):
        if before:
            value.cell_contents = before[0]
        else:
            del value.cell_contents
    elif isinstance(before, _Mark):
        _restore(value, before)
    elif isinstance(value, dict):
        swapped = {name: held for name, held in value.items() if id(held) in SWAPPED}
        value.clear()
        value.update({**before, **swapped})
    elif isinstance(value, set):
        value.clear()
        value.update(before)
    elif isinstance(value, list | collections.deque):
        value.clear()
        value.extend(before)
    elif isinstance(value, type):
        for name in vars(value).keys() - before.keys():
            delattr(value, name)
        for name in (name for name, now in dict(vars(value)).items() if now is not before[name]):
            setattr(value, name, before[name])
    else:
        vars(value).clear()
        vars(value).update(before)


def _restore(value: Any, before: _Mark) -> None:
    """Undoes what was written into an array; an iterator stays where it is."""
    if isinstance(value, bytearray):
        value[:] = before.state
    elif isinstance(value, array.array):
        value[:] = array.array(value.typecode, before.state)
    elif _is_array(value) and not value.dtype.hasobject:
        value[...] = sys.modules["numpy"].frombuffer(before.state, value.dtype).reshape(value.shape)
