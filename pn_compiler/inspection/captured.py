"""State captured by functions: cells, defaults, bound objects, arguments of partial, globals.

`copy.deepcopy` copies a function by reference, so the hooks and lambdas of a copied model would read and
write the original.
"""

import collections
import contextlib
import copy
import functools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

CONTAINERS = (dict, list, set, collections.deque)
_HOOKS = frozenset(
    [
        "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
        "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs", "_non_persistent_buffers_set",
        "_parameters", "_buffers", "_modules",
    ]
)  # fmt: skip


def is_plain_object(value: Any) -> bool:
    """Whether `value` is an instance of a user-defined class with settable attributes."""
    if isinstance(value, nn.Module | torch.Tensor | type | types.ModuleType | types.FunctionType):
        return False
    return hasattr(value, "__dict__") and not is_library(type(value))


def is_library(cls: type) -> bool:
    """Whether `cls` belongs to Python, torch, NumPy or this package, whose code keeps no state in models."""
    top = cls.__module__.partition(".")[0]
    return top in ("torch", "numpy", "pn_compiler") or (top in sys.stdlib_module_names and top != "__main__")


def held_by(value: Any) -> Iterator[Any]:
    """What `value` holds directly: a container's items, an object's attributes, a function's captures."""
    if isinstance(value, dict):
        yield from list(value.values())
    elif isinstance(value, list | set | tuple | frozenset | collections.deque):
        yield from list(value)
    elif isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif is_plain_object(value):
        yield from list(vars(value).values())


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # raises if it is empty
    except ValueError:
        return False
    return True


def reachable(values: Iterable[Any], *, through_functions: bool = True) -> Iterator[Any]:
    """`values` and everything they hold, once each; it does not look inside modules and tensors."""
    seen: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, str | int | float | bytes | type(None) | type):
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, nn.Module | torch.Tensor):
            continue
        if through_functions or not isinstance(value, types.FunctionType):
            stack.extend(held_by(value))


def named_globals(function: Any) -> Iterator[Any]:
    """Mutable globals that the code of `function` refers to."""
    function = getattr(function, "__func__", function)
    if isinstance(function, types.FunctionType):
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, (*CONTAINERS, nn.Module)) or is_plain_object(value):
                yield value


def nested_codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """`code` and that of the functions and comprehensions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested_codes(constant)


def attributes(module: nn.Module) -> list[Any]:
    """Attribute values of `module`, without parameters, buffers, submodules and hooks."""
    return [value for name, value in vars(module).items() if name not in _HOOKS]


def functions_of(cls: type) -> Iterator[types.FunctionType]:
    """The methods of a user-defined class and of its bases."""
    for base in cls.__mro__:
        if not is_library(base):
            for value in vars(base).values():
                function = getattr(value, "fget", getattr(value, "__func__", value))
                if isinstance(function, types.FunctionType):
                    yield function


def copy_with_functions(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of `model` whose hooks, lambdas and replaced forwards read and write the copy."""
    rebound, owned = _rebind(model, memo)

    def copied(value: Any) -> Any:
        return copy.deepcopy(value, memo) if any(id(v) in owned for v in reachable([value])) else value

    with _copied_methods():
        result = copy.deepcopy(model, memo)
        rebound.fill(copied)
    return result


@contextlib.contextmanager
def _copied_methods() -> Iterator[None]:
    """Makes deepcopy look up a bound method's function in the memo, as well as its object."""
    dispatch: dict[type, Any] = copy._deepcopy_dispatch  # type: ignore[attr-defined]
    original = dispatch[types.MethodType]

    def copy_method(method: types.MethodType, memo: dict[int, Any]) -> types.MethodType:
        return types.MethodType(copy.deepcopy(method.__func__, memo), copy.deepcopy(method.__self__, memo))

    dispatch[types.MethodType] = copy_method
    try:
        yield
    finally:
        dispatch[types.MethodType] = original


def _rebind(model: nn.Module, memo: dict[int, Any]) -> "tuple[_Rebound, set[int]]":
    """Puts copies of functions that capture parts of `model` into `memo`, for the deepcopy that follows.

    What functions capture from outside the model stays shared with the original: a hook that fills a
    dict in the user's script keeps doing so.
    """
    owned = {id(module) for module in model.modules()}
    for module in model.modules():
        mine = list(reachable(attributes(module), through_functions=False))
        owned |= {id(v) for v in mine if isinstance(v, CONTAINERS) or is_plain_object(v)}
        owned |= {id(v) for v in mine if isinstance(v, types.FunctionType) and v.__closure__}
        owned |= {id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}
    everything = [
        vars(module) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)
    ]
    functions: list[types.FunctionType] = []
    for value in reachable(everything):
        if isinstance(value, types.FunctionType):
            if any(id(v) in owned for v in reachable([value])):
                functions.append(value)
        elif isinstance(value, types.MethodType | functools.partial):
            _share_outsiders(value, owned, memo)
    rebound = _Rebound(functions)
    memo.update(rebound.copies)
    return rebound, owned


def _share_outsiders(value: Any, owned: set[int], memo: dict[int, Any]) -> None:
    """Shares what a bound method or partial holds that is not, and does not contain, a part of the model."""
    for held in held_by(value):
        mutable = isinstance(held, (*CONTAINERS, torch.Tensor)) or is_plain_object(held)
        if mutable and not any(id(v) in owned for v in reachable([held])):
            memo.setdefault(id(held), held)


class _Rebound:
    """Copies of functions, whose cells are filled once the objects that they capture have been copied."""

    def __init__(self, functions: list[types.FunctionType]) -> None:
        self._cells: dict[int, tuple[types.CellType, types.CellType]] = {}
        self._pairs = [(function, self._copy(function)) for function in functions]
        self.copies = {id(function): copied for function, copied in self._pairs}

    def _copy(self, function: types.FunctionType) -> types.FunctionType:
        closure = None
        if function.__closure__ is not None:
            closure = tuple(self._cell(cell) for cell in function.__closure__)
        copied = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
        )
        copied.__kwdefaults__ = function.__kwdefaults__
        copied.__dict__.update(function.__dict__)
        copied.__qualname__, copied.__module__ = function.__qualname__, function.__module__
        copied.__doc__, copied.__annotations__ = function.__doc__, function.__annotations__
        return copied

    def _cell(self, cell: types.CellType) -> types.CellType:
        return self._cells.setdefault(id(cell), (cell, types.CellType()))[1]

    def fill(self, copied: Any) -> None:
        """Points cells and defaults at the copies; `copied` maps an object to its copy."""
        for old, new in self._cells.values():
            if _is_filled(old):
                new.cell_contents = copied(old.cell_contents)
        for function, other in self._pairs:
            if function.__defaults__:
                other.__defaults__ = tuple(map(copied, function.__defaults__))
            if function.__kwdefaults__:
                other.__kwdefaults__ = {k: copied(v) for k, v in function.__kwdefaults__.items()}
