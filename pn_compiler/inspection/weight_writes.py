"""Whether the forward of a module that stays whole may write to weights; nothing is absorbed into those.

In traced code the writes are visible. Behind a branch on values, only the source shows them.
"""

import dis
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from pn_compiler.inspection.captured import attributes, functions_of, held_by, is_library, nested_codes

_WRITES = frozenset(
    [
        "__setattr__", "backward", "load_state_dict", "register_parameter", "setattr", "swap_tensors",
        "vector_to_parameters",
    ]
)  # fmt: skip
_READS = frozenset(
    ["_parameters", "data", "get_parameter", "named_parameters", "parameters", "state_dict"]
)  # fmt: skip


def may_write_weights(module: nn.Module) -> bool:
    """Whether the forward of `module` itself, or code that it calls, may write to a parameter.

    Code counts if it names parameters and contains an in-place operator, whatever that is applied to.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return False
    names = {name.rpartition(".")[2] for name, _ in module.named_parameters()}
    named: set[str] = set()
    in_place = False
    for code in _reached(module):
        used = set(code.co_names)
        steps = list(dis.get_instructions(code))
        stored = {step.argval for step in steps if step.opname == "STORE_ATTR"}
        if used & _WRITES or stored & {"data", *names}:
            return True
        named |= used
        in_place = in_place or any(map(_is_in_place, steps)) or any(map(_names_a_write, used))
    return in_place and bool(named & (_READS | names))


def _is_in_place(step: dis.Instruction) -> bool:
    binary = step.opname == "BINARY_OP" and step.argrepr.endswith("=")
    return binary or step.opname.startswith("INPLACE_") or step.opname in ("STORE_SUBSCR", "STORE_SLICE")


def _names_a_write(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_")


def _reached(module: nn.Module) -> Iterator[types.CodeType]:
    """The code of `module`'s forward and of the user-defined functions and methods that it names."""
    owners = {type(m) for m in module.modules() if not is_library(type(m))}
    methods: dict[str, list[types.FunctionType]] = {}
    for method in (method for owner in owners for method in functions_of(owner)):
        methods.setdefault(method.__name__, []).append(method)
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    remaining = [*_forwards(type(module)), *attributes(module), *hooks]
    seen: set[int] = set()
    while remaining:
        function = _function(remaining.pop())
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        for code in nested_codes(function.__code__):
            yield code
            named = {name for name in code.co_names if name != "forward"}
            remaining += (m for name in named for m in methods.get(name, ()))
            remaining += _named_values(function, named)


def _forwards(cls: type) -> Iterator[Any]:
    return (vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base) and not is_library(base))


def _function(value: Any) -> types.FunctionType | None:
    """The user-defined function that `value` is or calls, or None."""
    if isinstance(value, nn.Module):
        return None
    value = getattr(value, "func", value)  # of a partial
    value = getattr(value, "__func__", value)
    if not isinstance(value, types.FunctionType):
        return None
    value = inspect.unwrap(value)
    top = str(getattr(value, "__module__", "")).partition(".")[0]
    return value if isinstance(value, types.FunctionType) and top not in ("torch", "pn_compiler") else None


def _named_values(function: types.FunctionType, names: Iterable[str]) -> Iterator[Any]:
    """Globals, closure values and module contents that the code of `function` may name."""
    scope = function.__globals__
    yield from held_by(function)
    for name in names:
        value = scope.get(name)
        if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] != "torch":
            yield from (vars(value).get(other) for other in names)
        else:
            yield value
