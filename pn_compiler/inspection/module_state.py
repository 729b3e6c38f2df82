"""Tracks the side effects of a forward on its modules and on the state that they share."""

import contextlib
import dis
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pn_compiler.inspection.captured import attributes, functions_of, is_library, reachable
from pn_compiler.inspection.containers import Containers
from pn_compiler.inspection.fake_tensors import has_values

_WRITABLE = (torch.Tensor, int, float, str)


class ModuleState:
    """A snapshot of the attributes of all modules before a trace, which runs their code once, on proxies.

    A forward that counts calls or keeps a running value changes attributes. A graph would not, so such a
    module has to stay whole.

    Args:
        model: the model whose modules are tracked until `restore`.
        with_globals: also track the global variables of the code of its modules.
    """

    def __init__(self, model: nn.Module, *, with_globals: bool = False) -> None:
        self._held = {
            path: (module, dict(vars(module)), _registered(module))
            for path, module in model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)
        }
        buffers = (buffer for buffer in model.buffers() if not buffer.is_inference())
        self._values = {buffer: (buffer._version, buffer.detach().clone()) for buffer in buffers}
        self._parameters = [_Parameter(parameter) for parameter in model.parameters()]
        self.containers = Containers()
        for path, (module, _, _) in self._held.items():
            self.containers.add([*attributes(module), *_hooks(module)], path)
            self.containers.add(functions_of(type(module)), path)
            self.containers.add_classes(type(module), path)
            if with_globals and not is_library(type(module)):
                for function in functions_of(type(module)):
                    self.containers.add_globals(function.__globals__)

    def changes(self) -> tuple[set[str], set[tuple[str, str]]]:
        """(paths of modules whose numbers or tensors changed, (path, attribute) of values only stored)."""
        changed, stored = set(), set()
        overwritten = self._overwritten()
        for path, (module, before, registered) in self._held.items():
            for name, value in vars(module).items():
                if value is before.get(name):
                    continue
                if isinstance(before.get(name), _WRITABLE):
                    changed.add(path)
                elif _holds_proxy(value):
                    stored.add((path, name))
            now = _registered(module)
            if any(new.keys() != old.keys() or any(new[k] is not old[k] for k in old)
                   for new, old in zip(now, registered, strict=True)):  # fmt: skip
                changed.add(path)
            if any(buffer in overwritten for buffer in registered[1].values()):
                changed.add(path)
        return changed, stored

    def rewritten(self) -> bool:
        """Whether the data, requires_grad flag or gradient of a parameter was replaced."""
        return any(parameter.changed() for parameter in self._parameters)

    def _overwritten(self) -> set[torch.Tensor | None]:
        return {buffer for buffer, (version, _) in self._values.items() if buffer._version != version}

    @torch.no_grad()
    def restore(self, *, traced: bool = True) -> None:
        """Undoes the changes. If `traced`, new attributes without proxies stay: the graph's constants."""
        for buffer, (version, value) in self._values.items():
            if buffer._version != version or _is_updated(buffer, value):
                buffer.copy_(value)
        for module, before, registered in self._held.values():
            for name in vars(module).keys() - before.keys():
                if not traced or _holds_proxy(vars(module)[name]):
                    object.__delattr__(module, name)
            vars(module).update(before)
            for now, old in zip(_registered(module, copied=False), registered, strict=True):
                now.clear()
                now.update(old)
        for parameter in self._parameters:
            parameter.restore()
        self.containers.restore()


def _is_updated(buffer: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether `buffer`, a possible running statistic, was updated: batch_norm does not bump its version."""
    return buffer.dim() < 2 and has_values(buffer) and not torch.equal(buffer, before)


def _registered(module: nn.Module, *, copied: bool = True) -> tuple[dict[str, Any], ...]:
    registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
    return tuple(dict(values) for values in registries) if copied else registries


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _holds_proxy(value: Any) -> bool:
    return any(isinstance(v, fx.Proxy) for v in reachable([value]))


class _Parameter:
    """The state of a parameter that can change without an operator: data, requires_grad, gradient."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter
        self._data = parameter.data
        self._storage = storage_of(parameter)
        self._flag, self._grad = parameter.requires_grad, parameter.grad if parameter.is_leaf else None

    def changed(self) -> bool:
        now = self._parameter
        grad = now.grad if now.is_leaf else None
        return (
            storage_of(now) != self._storage
            or now.shape != self._data.shape
            or now.requires_grad is not self._flag
            or grad is not self._grad
        )

    def restore(self) -> None:
        if self.changed():
            self._parameter.data = self._data
            self._parameter.grad = self._grad
            self._parameter.requires_grad_(self._flag)


class WrittenParameters(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Saves the values of parameters that operators overwrite while it is active, to restore them."""

    supports_higher_order_operators = True  # torch.cond and the like, whose operators arrive here one by one

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters: dict[int, list[torch.Tensor]] = {}
        for parameter in model.parameters():
            self._parameters.setdefault(storage_of(parameter), []).append(parameter.detach())
        self._kept: dict[int, list[torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and (key := storage_of(leaf)) in self._parameters:
                    self._kept.setdefault(key, [old.clone() for old in self._parameters[key]])
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Undoes the writes."""
        for key, values in self._kept.items():
            for parameter, value in zip(self._parameters[key], values, strict=True):
                parameter.copy_(value)


def storage_of(tensor: torch.Tensor) -> int:
    """An id of the memory of `tensor`."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # sparse and quantized tensors
        return id(tensor)


@contextlib.contextmanager
def hidden(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Hides the attributes that the modules at `paths`, which stay whole, may set when they run.

    Code that reads such an attribute during a trace would keep the value left by an earlier call.
    """
    taken: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for path in paths:
            module = model.get_submodule(path)
            names = _set_in_calls(type(module))
            hidden_values = {name: value for name, value in vars(module).items() if name in names}
            taken.append((module, hidden_values))
            for name in hidden_values:
                object.__delattr__(module, name)
        yield
    finally:
        for module, hidden_values in taken:
            vars(module).update(hidden_values)


def _set_in_calls(cls: type) -> set[str]:
    """Attributes that methods other than the constructor assign."""
    stores = ("STORE_ATTR", "DELETE_ATTR")
    methods = (f for f in functions_of(cls) if f.__name__ not in ("__init__", "__setstate__", "train"))
    return {
        str(instruction.argval)
        for function in methods
        for instruction in dis.get_instructions(function)
        if instruction.opname in stores
    } - {"training"}


def inside_checkpoint() -> bool:
    """Whether the running code was called by torch.utils.checkpoint, which a graph does not record."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
    return False
