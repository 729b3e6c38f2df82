"""Detects code that calls batch_norm as a function, which the modules of a model do not show."""

import contextlib
import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from pn_compiler.inspection.captured import nested_codes
from pn_compiler.inspection.hooks import HOOKS

NAMES = frozenset(
    [
        "batch_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_impl_index",
        "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_with_update",
        "_native_batch_norm_legit_functional", "_batch_norm_no_update", "_batch_norm_with_update_functional",
    ]
)  # fmt: skip
_FOLLOWED = types.ModuleType | torch._ops._OpNamespace | torch._ops.OpOverloadPacket | type(torch.ops)


def is_batch_norm_function(value: Any) -> bool:
    """Whether `value` is the batch_norm function of torch, torch.nn.functional or ATen."""
    if isinstance(value, torch._ops.OpOverload):
        value = value.overloadpacket
    if isinstance(value, torch._ops.OpOverloadPacket):
        namespace, _, name = value._qualified_op_name.partition("::")
        return namespace == "aten" and name in NAMES
    name = getattr(value, "__name__", "")
    return name in NAMES and any(getattr(space, name, None) is value for space in (F, torch))


def calls_batch_norm(module: nn.Module) -> bool:
    """Whether the forward of `module`, or anything it calls except its children, calls batch_norm."""
    if isinstance(module, torch.jit.ScriptModule):
        return "aten::batch_norm" in str(getattr(module, "inlined_graph", ""))
    if isinstance(module, fx.GraphModule):
        return any(is_batch_norm_function(node.target) for node in module.graph.nodes)
    own_calls = _forward_calls(type(module))  # type: ignore[arg-type]  # classes are hashable
    return own_calls or any(map(reaches_batch_norm, held_functions(module)))


def held_functions(module: nn.Module) -> list[Any]:
    """The functions among the attributes of `module`, and its hooks."""
    held = [function for value in vars(module).values() for function in _functions_in(value)]
    return held + [hook for name in HOOKS for hook in getattr(module, name).values()]


def _functions_in(value: Any) -> list[Any]:
    """The callables that are not modules in `value`, which may be a tuple, list or dict of them."""
    values = (
        value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else (value,)
    )
    return [each for each in values if callable(each) and not isinstance(each, nn.Module | fx.Proxy)]


def names_in(function: Any) -> set[str]:
    """The attributes and globals that the code of `function` names."""
    code = getattr(_plain(function), "__code__", None)
    return {name for part in nested_codes(code) for name in part.co_names} if code is not None else set()


@functools.cache
def _forward_calls(cls: type[nn.Module]) -> bool:
    return not _is_of_torch(cls) and _reaches(cls.forward, cls, set())


def reaches_batch_norm(function: Any) -> bool:
    """Whether `function`, possibly user-defined, is or calls batch_norm."""
    return _reaches(function, None, set())


def _is_of_torch(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] == "torch"


def _reaches(function: Any, cls: type | None, seen: set[int]) -> bool:
    """Whether `function`, a method of `cls` if that is given, calls batch_norm."""
    if isinstance(function, types.MethodType) and _is_autograd_function(function.__self__):
        function = function.__self__  # the function behind an apply that has a name of its own
    function = _plain(function)
    if is_batch_norm_function(function):
        return True
    if id(function) in seen or _is_of_torch(function):
        return False
    seen.add(id(function))
    if _is_autograd_function(function):
        own = (_plain(value) for value in vars(function).values())
        return any(_reaches(value, function, seen) for value in own if isinstance(value, types.FunctionType))
    if not isinstance(function, types.FunctionType):
        return False
    return any(_uses(code, function, cls, seen) for code in nested_codes(function.__code__))


def _is_autograd_function(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.autograd.Function)


def _plain(function: Any) -> Any:
    """What is behind partial, bound methods, staticmethod, property and functools.wraps."""
    while True:
        inner: Any = None
        if isinstance(function, functools.partial):
            inner = function.func
        elif isinstance(function, types.MethodType | staticmethod | classmethod):
            inner = function.__func__
        elif isinstance(function, property):
            inner = function.fget
        elif isinstance(function, types.FunctionType):
            inner = vars(function).get("__wrapped__")
        if inner is None:
            return function
        function = inner


def _uses(code: types.CodeType, function: types.FunctionType, cls: type | None, seen: set[int]) -> bool:
    """Whether `code`, part of `function`, names batch_norm, or something that reaches it."""
    scope = scope_of(function)
    imports = False  # of torch, here in the code: its names are local then
    value: Any = None
    for step in dis.get_instructions(code):
        name = step.argval
        if step.opname == "IMPORT_NAME":
            imports = imports or str(name).partition(".")[0] == "torch"
        elif name in NAMES and (imports or (step.opname == "LOAD_CONST" and "getattr" in code.co_names)):
            return True
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"):
            value = scope.get(str(name))
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            value = getattr(value, str(name), None) if isinstance(value, _FOLLOWED) else None
            if cls is not None and any(_reaches(m, cls, seen) for m in _methods(cls, str(name))):
                return True
        else:
            value = None
        if any(_reaches(each, None, seen) for each in _functions_in(value)):
            return True
    return False


def scope_of(function: types.FunctionType) -> dict[str, Any]:
    """The globals and closure variables of `function`, by name."""
    scope = {**function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # empty: the function is called before this is defined
            scope[name] = cell.cell_contents
    return scope


def _methods(cls: type, name: str) -> Iterator[Any]:
    """What the classes that users wrote define under `name`: self.name and super().name may call it."""
    for base in cls.__mro__:
        if name in vars(base) and not _is_of_torch(base) and base is not object:
            yield vars(base)[name]
