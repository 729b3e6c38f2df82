"""Checks that a pickle holds only what torch.save writes for tensors and modules.

It checks the output of `pn_compiler.loading.inert_pickle`, before anything is imported, created or allocated.
"""

import collections
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pn_compiler.base.errors import LoadError
from pn_compiler.loading.admission import is_module_class
from pn_compiler.loading.archives import Archive
from pn_compiler.loading.inert_pickle import Call, Mapping, Name, Parsed, Stored, parse_pickle
from pn_compiler.loading.inert_types import inert_type, is_inert_call

_ENTRY = re.compile(
    r"data\.pkl|data/\d+|byteorder|version|\.format_version|\.storage_alignment|\.data/\w{1,40}", re.ASCII
)
#: The part of those below that torch admits only on request.
ON_REQUEST = {
    "functools.partial": functools.partial,
    "collections.defaultdict": collections.defaultdict,
    "builtins.slice": slice,
    "builtins.range": range,
}
#: Functions that build tensors and other data; they may be called, but are never values.
_BUILDERS = frozenset(
    ["torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter",
     "torch._utils._rebuild_parameter_with_state", "torch.Size", "torch.device", "collections.OrderedDict",
     "torch.serialization._get_layout", "builtins.set", "builtins.complex", "builtins.slice",
     "builtins.range", "collections.defaultdict", "_codecs.encode", "functools.partial"]
)  # fmt: skip
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_STORAGES = {
    "torch.DoubleStorage": 8, "torch.FloatStorage": 4, "torch.HalfStorage": 2, "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8, "torch.IntStorage": 4, "torch.ShortStorage": 2, "torch.CharStorage": 1,
    "torch.ByteStorage": 1, "torch.BoolStorage": 1, "torch.ComplexDoubleStorage": 16,
    "torch.ComplexFloatStorage": 8, "torch.storage.UntypedStorage": 1,
}  # fmt: skip
_LEAVES = (bool, float, str, bytes, type(None))
_LARGEST = 2**63  # integers
_MOST_ELEMENTS = 2**20  # of a tensor that repeats the elements of its storage
_MOST_VALUES = 2_000_000  # in total, counting shared values wherever they are used
_MOST_DIMS = 25  # the limit of torch's operators
_DEEPEST = 150  # nesting of containers and modules
_DEEPEST_STACK = 10_000  # layers of a recurrent network, which torch loops over
#: Names of submodules, parameters and buffers that torch.fx writes verbatim into source.
SAFE_NAME = re.compile(r"[\w :/+-]{1,200}")


def names_in(parsed: Parsed) -> list[str]:
    """The names that a pickle refers to, except those of tensors and containers."""
    return [name for name in parsed.names if not _is_data(name)]


def _is_data(name: str) -> bool:
    return name in _BUILDERS or name in _STORAGES or _is_dtype(name)


def _is_dtype(name: str) -> bool:
    module, _, dtype = name.partition(".")
    return module == "torch" and isinstance(getattr(torch, dtype, None), torch.dtype)


def audit_pickle(archive: Archive, admit: Callable[[str], Any]) -> None:
    """Checks that ``data.pkl`` in `archive` describes tensors, plain values and modules as torch makes them.

    Args:
        archive: an archive written by torch.save.
        admit: returns the object for any other name, or None if it is not admitted.

    Raises:
        LoadError: it calls something else, or describes modules or tensors that torch would not create.
    """
    for name in archive.sizes:
        if not _ENTRY.fullmatch(name):
            raise LoadError(f"{archive.path} holds {name[:80]!r}, which torch.save does not write")
    try:
        parsed = parse_pickle(archive.read("data.pkl"))
        audit = _Audit(archive, admit)
        audit.count(parsed.value)
        for call in parsed.calls:  # torch makes them also where a later value takes their place
            audit.count(call)
    except RecursionError as error:
        raise LoadError(f"{archive.path} holds values nested too deep") from error


class _Audit:
    def __init__(self, archive: Archive, admit: Callable[[str], Any]) -> None:
        self.archive = archive
        self.admit = admit
        self.counts: dict[int, int] = {}  # by id
        self.open: list[int] = []  # ids of the values being checked

    def count(self, value: Any) -> int:
        """The number of values in `value`. Raises LoadError if one of them is not harmless."""
        if isinstance(value, _LEAVES):
            return 1
        if isinstance(value, int):
            self.require(-_LARGEST <= value < _LARGEST, f"the number {str(value)[:20]}...")
            return 1
        if isinstance(value, Name):
            other = _is_data(value.path) or inert_type(value.path) is not None
            known = not other and self.admit(value.path) is not None
            self.require(known or _is_dtype(value.path), f"a reference to {value.path[:80]}")
            return 1
        count = self.counts.get(id(value))
        if count is None:
            self.require(id(value) not in self.open, "a value that contains itself")
            self.require(len(self.open) < _DEEPEST, "values nested too deep")
            self.open.append(id(value))
            count = self.counts[id(value)] = 1 + self.inside(value)
            self.open.pop()
            self.require(count < _MOST_VALUES, "too many values")
        return count

    def require(self, condition: bool, what: str) -> None:
        if not condition:
            raise LoadError(f"{self.archive.path} holds {what}: it is not what torch.save writes of a model")

    def inside(self, value: Any) -> int:
        if isinstance(value, Mapping):
            self.check_metadata(value)
        if isinstance(value, dict):
            return sum(self.count(key) + self.count(item) for key, item in value.items())
        if isinstance(value, list | tuple | set):
            return sum(map(self.count, value))
        self.require(isinstance(value, Call), "a storage outside of a tensor")
        self.require(
            isinstance(value.function, Name) and isinstance(value.arguments, tuple), "a call of a value"
        )
        return self.call(value, value.function.path)

    def check_metadata(self, value: Mapping) -> None:
        """An OrderedDict has no attributes except a state_dict's versions: others might hide items()."""
        state = value.state
        fine = state is None or (isinstance(state, dict) and state.keys() <= {"_metadata"})
        self.require(fine, "a dictionary with attributes")
        self.count(state)

    def call(self, value: Call, path: str) -> int:
        if path in _TENSORS:
            self.check_tensor(value)
        elif path in _PARAMETERS:
            self.check_parameter(value)
        elif path in _BUILDERS:
            self.check_builder(value, path)
        elif inert_type(path) is not None:
            return self.inert(value, path)
        else:
            return self.instance(value, self.admit(path), path)
        return 1

    # Tensors

    def check_tensor(self, value: Call) -> None:
        versions = {_TENSORS[0]: (6, 7), _TENSORS[1]: (7, 8)}[value.function.path]
        arguments = value.arguments
        self.require(len(arguments) in versions and value.state is None, "a tensor with a state")
        storage, offset, size, stride, gradient, hooks, *_ = arguments
        self.require(isinstance(storage, Stored), "a tensor without values")
        elements = self.elements(storage.id)
        if value.function.path == _TENSORS[1]:
            self.require(
                isinstance(arguments[6], Name) and _is_dtype(arguments[6].path), "a tensor of no dtype"
            )
            elements //= getattr(torch, arguments[6].path.partition(".")[2]).itemsize
        self.require(type(gradient) is bool and self.is_empty(hooks), "a tensor with hooks")
        self.require(self.is_empty(arguments[-1]) or len(arguments) < versions[1], "a tensor with metadata")
        self.require(fits(size, stride, offset, elements), "a tensor of impossible size")

    def elements(self, persistent_id: Any) -> int:
        """The number of elements of a storage; the number of bytes if it has no type."""
        fine = isinstance(persistent_id, tuple) and len(persistent_id) == 5 and persistent_id[0] == "storage"
        self.require(fine, "something stored that is no tensor")
        _, kind, key, _, elements = persistent_id
        self.require(isinstance(kind, Name) and kind.path in _STORAGES, "a tensor of an unknown type")
        self.require(isinstance(key, str) and key.isdecimal(), "a storage without a number")
        size = self.archive.sizes.get(f"data/{key}")
        if size is None or type(elements) is not int or elements * _STORAGES[kind.path] != size:
            raise LoadError(
                f"{self.archive.path} is damaged: the values of a tensor are missing or cut short"
            )
        return elements

    def check_parameter(self, value: Call) -> None:
        data, gradient, hooks, *state = (*value.arguments, None, None, None)[:4]
        self.require(self.is_tensor(data) and type(gradient) is bool, "a parameter without values")
        self.require(
            self.is_empty(hooks) and value.state is None and not any(state), "a parameter with hooks"
        )
        self.count(data)

    def is_tensor(self, value: Any) -> bool:
        return (
            isinstance(value, Call) and isinstance(value.function, Name) and value.function.path in _TENSORS
        )

    def is_empty(self, hooks: Any) -> bool:
        return hooks is None or (isinstance(hooks, dict) and not hooks and not getattr(hooks, "state", None))

    # Calls

    def check_builder(self, value: Call, path: str) -> None:
        arguments = value.arguments
        rule = _RULES.get(path)
        self.require(rule is not None and not value.new and rule(arguments), f"a strange call of {path}")
        if path == "functools.partial":
            self.check_partial(value)
        else:
            self.require(value.state is None, f"{path} with a state")
        for argument in arguments:
            self.count(argument)

    def check_partial(self, value: Call) -> None:
        """Accepts a partial of a module class or an activation function, with plain values."""
        state = value.state
        fine = (
            isinstance(state, tuple) and len(state) == 4 and not state[3] and state[0] is value.arguments[0]
        )
        self.require(fine, "a functools.partial with another state than its own")
        self.count(state)

    # Instances

    def inert(self, value: Call, path: str) -> int:
        self.require(is_inert_call(value), f"a strange call of {path}")
        if isinstance(value.state, dict):
            for key, item in value.state.items():
                self.check_attribute(key, item, inert_type(path))
        given = (argument for argument in value.arguments if not isinstance(argument, Name))
        return sum(map(self.count, given)) + self.count(value.state)

    def instance(self, value: Call, cls: Any, path: str) -> int:
        if is_module_class(cls):
            self.require(value.new and value.arguments == (), f"a call of {path}")
            self.require(isinstance(value.state, dict), f"a {path} without a state")
            return self.module(value.state, cls)
        self.require(inspect.isclass(cls), f"a call of {path}")
        for key, item in value.state.items() if isinstance(value.state, dict) else ():
            self.check_attribute(key, item, cls)
        return self.count(value.arguments) + self.count(value.state)

    def module(self, state: dict[Any, Any], cls: type) -> int:
        """Checks a module's future ``__dict__``: it must be as the constructor of nn.Module creates it."""
        for key in ("_modules", "_parameters", "_buffers"):
            self.require(isinstance(state.get(key), dict), f"a {cls.__name__} without {key}")
            for name, item in state[key].items():
                self.check_name(name, cls)
                self.require(item is None or self.is_member(item, key), f"{name!r} in {key}, which is none")
        hooks = all(isinstance(state.get(key), dict) for key in ("_forward_hooks", "_backward_hooks"))
        self.require(hooks, f"a {cls.__name__} without what belongs to it")
        self.require(type(state.get("training")) is bool, f"a {cls.__name__} without a mode")
        layers = state.get("num_layers", 1)
        self.require(
            type(layers) is not int or layers <= _DEEPEST_STACK, f"a {cls.__name__} of {layers} layers"
        )
        for key, item in state.items():
            self.check_attribute(key, item, cls)
        return self.count(state)

    def is_member(self, item: Any, key: str) -> bool:
        if not isinstance(item, Call) or not isinstance(item.function, Name):
            return False
        if key == "_modules":
            return is_module_class(self.admit_class(item.function.path))
        return item.function.path in (_PARAMETERS if key == "_parameters" else (*_TENSORS, *_PARAMETERS))

    def admit_class(self, path: str) -> Any:
        return None if _is_data(path) else self.admit(path)

    def check_name(self, name: Any, cls: type) -> None:
        fine = isinstance(name, str) and SAFE_NAME.fullmatch(name) and not name.startswith("__")
        self.require(bool(fine), f"the name {str(name)[:60]!r} in a {cls.__name__}")
        self.require(not is_behaviour(cls, name), f"{name!r} in place of a method of {cls.__name__}")

    def check_attribute(self, key: Any, item: Any, cls: type) -> None:
        fine = isinstance(key, str) and key.isidentifier() and not key.startswith("__")
        self.require(bool(fine), f"the attribute {str(key)[:60]!r} of a {cls.__name__}")
        self.require(not is_behaviour(cls, key), f"{key!r} in place of a method of {cls.__name__}")
        if "_hooks" in key:
            self.require(self.is_empty(item), f"{key} of a {cls.__name__}, which would be called")
        self.require(key != "_compiled_call_impl" or item is None, "a compiled call")


def is_behaviour(cls: type, name: str) -> bool:
    """Whether `name` is a method or property of `cls`, with which the state would conflict."""
    attribute = inspect.getattr_static(cls, name, None)
    return callable(attribute) or hasattr(type(attribute), "__get__")


def fits(size: Any, stride: Any, offset: Any, elements: int) -> bool:
    """Whether a tensor of this size, stride (per dim) and offset lies within a storage of `elements`."""
    if not isinstance(size, list | tuple) or not isinstance(stride, list | tuple):
        return False
    if not all(type(number) is int and 0 <= number < _LARGEST for number in (offset, *size, *stride)):
        return False
    if len(size) != len(stride) or len(size) > _MOST_DIMS:
        return False
    count, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        count *= length
        last += (length - 1) * step
    return count == 0 or (last < elements and count <= max(elements, _MOST_ELEMENTS))


_RULES: dict[str, Callable[[Sequence[Any]], bool]] = {
    "functools.partial": lambda a: len(a) == 1 and isinstance(a[0], Name) and not _is_data(a[0].path),
    "torch.Size": lambda a: len(a) == 1 and isinstance(a[0], tuple),
    "torch.device": lambda a: len(a) in (1, 2) and isinstance(a[0], str),
    "torch.serialization._get_layout": lambda a: len(a) == 1 and isinstance(a[0], str),
    "builtins.set": lambda a: len(a) == 1 and isinstance(a[0], list),
    "builtins.complex": lambda a: len(a) == 2 and all(isinstance(x, float) for x in a),
    "builtins.slice": lambda a: len(a) == 3,
    "builtins.range": lambda a: len(a) == 3 and all(isinstance(x, int) for x in a),
    "collections.defaultdict": lambda a: len(a) == 1 and isinstance(a[0], Name),
    "_codecs.encode": lambda a: len(a) == 2 and isinstance(a[0], str) and a[1] == "latin1",
}
