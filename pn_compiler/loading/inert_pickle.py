"""Reads a pickle into plain data, without importing or calling anything that it names.

This shows what `torch.load` would do with the file. The opcodes are those of torch's weights-only unpickler,
which has no others.
"""

import dataclasses
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # names of Python 2, which torch.save writes
from collections.abc import Callable
from typing import Any

from pn_compiler.base.errors import LoadError

_LONGEST = 10_000_000  # opcodes
_GETATTR = "builtins.getattr"
_CLASS = re.compile(r"(.+\.)?_*[A-Z]\w*", re.ASCII)  # how classes are named, behind the path of their module


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Name:
    """An object that a pickle refers to by its dotted path."""

    path: str


@dataclasses.dataclass(eq=False, slots=True)
class Call:
    """An object made by a call, or by ``cls.__new__`` if `new`, with a state that is set afterwards.

    Attributes:
        function: a `Name`, unless the pickle is hostile.
        arguments: arguments of the call.
        state: the state that BUILD sets; None if there is none.
    """

    function: Any
    arguments: Any
    new: bool = False
    state: Any = None


class Mapping(dict[Any, Any]):
    """An OrderedDict. Its attributes, such as ``_metadata`` of a state_dict, are in `state`."""

    state: Any = None


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """Data in another entry of the archive, by its persistent id."""

    id: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Parsed:
    """A pickle as plain data.

    Attributes:
        value: its content as plain values and containers, `Name`, `Call`, `Mapping` and `Stored`.
        names: the sorted dotted paths of everything that it refers to.
        calls: all that it makes, also where the content does not hold it.
        nested: path of a class inside a class -> that of the outer one.
    """

    value: Any
    names: list[str]
    calls: list[Call]
    nested: dict[str, str]


def parse_pickle(content: bytes) -> Parsed:
    """Reads a pickle.

    Raises:
        LoadError: it is damaged, or uses what torch.save does not write.
    """
    reader = _Reader()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if opcode.name == "STOP":
                value = reader.stack.pop()
                return Parsed(value, reader.used_names(), reader.calls, reader.nested)
            reader.read(opcode.name if count < _LONGEST else "an endless pickle", argument)
    except LoadError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise LoadError("its pickle is damaged") from error
    raise LoadError("its pickle is cut short")


class _Reader:
    """A stack machine for the opcodes of pickles."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.names: set[str] = set()
        self.calls: list[Call] = []
        self.nested: dict[str, str] = {}

    def used_names(self) -> list[str]:
        """All names, without those that only led to a class inside a class."""
        called = {call.function.path for call in self.calls if isinstance(call.function, Name)}
        led = {_GETATTR, *self.nested.values()} - called if self.nested else set()
        return sorted((self.names | self.nested.keys()) - led)

    def read(self, opcode: str, argument: Any) -> None:
        if opcode in _VALUES:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            self.stack[len(self.stack) - count :] = [tuple(self.stack[len(self.stack) - count :])]
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif opcode == "PROTO":
            if argument != 2:
                raise LoadError(f"its pickle has protocol {argument}: torch.save writes 2")
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        else:
            raise LoadError(f"its pickle uses {opcode}, which torch.save does not write")

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def make_tuple(self, _: Any) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def name(self, argument: str) -> None:
        module, name = argument.split(" ")
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        self.stack.append(Name(f"{module}.{name}"))
        self.names.add(f"{module}.{name}")

    def append(self, _: Any) -> None:
        self.extend_with([self.stack.pop()])

    def appends(self, _: Any) -> None:
        self.extend_with(self.pop_mark())

    def extend_with(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise LoadError("its pickle appends to what is no list")
        self.stack[-1].extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update_with([key, value])

    def set_items(self, _: Any) -> None:
        self.update_with(self.pop_mark())

    def update_with(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise LoadError("its pickle sets items of what is no dictionary")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        path = function.path if isinstance(function, Name) else None
        if path == "collections.OrderedDict" and arguments == ():
            self.stack.append(Mapping())
        elif path == _GETATTR and _is_nested_class(arguments):
            outer, attribute = arguments
            self.nested[f"{outer.path}.{attribute}"] = outer.path
            self.stack.append(Name(f"{outer.path}.{attribute}"))
        else:
            self.push(Call(function, arguments))

    def new(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.push(Call(function, arguments, new=True))

    def push(self, call: Call) -> None:
        self.calls.append(call)
        self.stack.append(call)

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Call | Mapping) or target.state is not None:
            raise LoadError("its pickle gives a state to what has none")
        target.state = state

    def stored(self, _: Any) -> None:
        self.stack.append(Stored(self.stack.pop()))


def _is_nested_class(arguments: Any) -> bool:
    """Whether ``getattr(*arguments)`` names a class inside a class, as protocol 2 has to write it."""
    if not isinstance(arguments, tuple) or len(arguments) != 2:
        return False
    outer, name = arguments
    named = isinstance(outer, Name) and isinstance(name, str)
    return named and bool(_CLASS.fullmatch(outer.path) and _CLASS.fullmatch(name)) and "." not in name


_VALUES = ("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1")
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ACTIONS: dict[str, Callable[[_Reader, Any], None]] = {
    "MARK": _Reader.mark,
    "TUPLE": _Reader.make_tuple,
    "GLOBAL": _Reader.name,
    "APPEND": _Reader.append,
    "APPENDS": _Reader.appends,
    "SETITEM": _Reader.set_item,
    "SETITEMS": _Reader.set_items,
    "REDUCE": _Reader.reduce,
    "NEWOBJ": _Reader.new,
    "BUILD": _Reader.build,
    "BINPERSID": _Reader.stored,
}
