"""Hooks of modules: those that a graph would lose, and modules that read what hooks write."""

import dataclasses
from typing import Any

import torch
from torch import nn

from pn_compiler.inspection.captured import (
    CONTAINERS,
    attributes,
    functions_of,
    is_plain_object,
    named_globals,
    reachable,
)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOKS_AND_OPTIONS = (
    *HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to be called before or after `module`."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def may_change_calls(module: nn.Module) -> bool:
    """Whether hooks that are not torch's own may change what `module` is called with, or returns."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(map(_of_torch, hooks))


@dataclasses.dataclass(frozen=True, slots=True)
class HookedModules:
    """Modules inside a model that hooks keep from being traced into.

    Attributes:
        hooked: paths of modules with hooks that do more than compute: a graph calls them as they are.
        reading: paths of modules whose forward may read what a hook has written; "" is the model itself.
    """

    hooked: frozenset[str]
    reading: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> "HookedModules":
        modules = {
            path: module
            for path, module in model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)
        }
        captured = {path: _captured(module) for path, module in modules.items()}
        written = {id(value) for values in captured.values() for value in values}
        hooked = {path for path, module in modules.items() if captured[path] or _has_backward_hooks(module)}
        reading = (
            {path for path, module in modules.items() if written & _readable(module)} if written else set()
        )
        return cls(frozenset(hooked - {""}), frozenset(reading))


def _captured(module: nn.Module) -> list[Any]:
    """The objects that the forward hooks of `module` can write to."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    hooks = [hook for hook in hooks if not _of_torch(hook)]
    mutable = [value for value in reachable(hooks) if _is_mutable(value)]
    return [*mutable, *(value for hook in reachable(hooks) for value in named_globals(hook))]


def _of_torch(hook: Any) -> bool:
    """Whether `hook` is one of torch's own, such as that of weight_norm."""
    where = getattr(hook, "__module__", None) or type(hook).__module__
    return str(where).startswith("torch.")


def _is_mutable(value: Any) -> bool:
    return isinstance(value, (*CONTAINERS, nn.Module)) or is_plain_object(value)


def _has_backward_hooks(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _readable(module: nn.Module) -> set[int]:
    """Ids of what the forward of `module` can read: itself, its attributes, its code's globals."""
    held = reachable([*attributes(module), *functions_of(type(module))])
    named = (value for function in functions_of(type(module)) for value in named_globals(function))
    return {id(module), *map(id, held), *map(id, named)}


def sharing_tensors(model: nn.Module) -> frozenset[str]:
    """Paths of modules that share a container of tensors with another module.

    Unless they are traced together, what one of them stores there for the other would become a constant.
    """
    owners: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            for value in reachable(attributes(module)):
                if isinstance(value, CONTAINERS) and _holds_tensor(value):
                    owners.setdefault(id(value), set()).add(path)
    return frozenset(path for paths in owners.values() if len(paths) > 1 for path in paths)


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(held, torch.Tensor) for held in reachable([value]))
