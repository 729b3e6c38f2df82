"""Classes that are a graph and the class that the graph was traced from, and how they are pickled."""

import functools
import inspect
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.graph.own_containers import container_methods

PART = "_pn_part"  # attribute of a graph, and of a module that became part of one: what it was before

#: The methods of original classes whose code is running, outermost first; None for a graph that they call.
watched: list[Any] = []


class _OwnInit(nn.Module):
    """Stands between a graph's class and the user's, whose ``__init__`` and ``__new__`` must not run."""

    def __new__(cls, *_: Any, **__: Any) -> "_OwnInit":
        return object.__new__(cls)

    def __init__(self) -> None:
        nn.Module.__init__(self)


def own_methods(kind: type[nn.Module]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Name and function of each method of the user's class `kind` that is none of torch's own."""
    for name in dir(kind):
        function = inspect.getattr_static(kind, name)
        of_torch = any(name in vars(cls) for cls in kind.__mro__ if cls.__module__.startswith("torch.nn."))
        if isinstance(function, types.FunctionType) and not of_torch and name != "forward":
            yield name, function


def take_class(gm: fx.GraphModule, graph_class: type[fx.GraphModule], kind: type[nn.Module]) -> None:
    """Makes `gm` an instance of `kind` as well as of `graph_class`.

    So it has the methods, properties and class attributes of `kind`, ``super()`` and ``isinstance`` work
    in them, and a Sequential is still subscripted and iterated over. Its forward remains that of the graph.
    """
    both = _both(graph_class, kind)  # type: ignore[arg-type]  # classes are hashable
    if both is not None:
        # torch.fx gives each instance a class of its own, of this name, for its forward
        gm.__class__ = types.new_class("GraphModuleImpl", (both,))
        type(gm).__name__, type(gm).__module__ = kind.__name__, fx.GraphModule.__module__
        gm.recompile()


def original_class(cls: type) -> type[nn.Module] | None:
    """The class given to `take_class`, None if there was none."""
    if _OwnInit not in cls.__mro__:
        return None
    return cls.__mro__[cls.__mro__.index(_OwnInit) + 1]


@functools.cache
def _both(graph_class: type[fx.GraphModule], kind: type[nn.Module]) -> type[fx.GraphModule] | None:
    if kind is nn.Module or issubclass(kind, fx.GraphModule):
        return None

    def fill(namespace: dict[str, Any]) -> None:
        for name, function in own_methods(kind):
            if not hasattr(graph_class, name):
                namespace[name] = _calling_part(name, function)
        namespace.update(container_methods(kind, _added_children))
        namespace["__module__"] = kind.__module__

    try:
        return types.new_class(kind.__name__, (graph_class, _OwnInit, kind), exec_body=fill)
    except Exception:  # the metaclass or __init_subclass__ of the user's class refuses; attributes remain
        return None


def _added_children(module: nn.Module) -> frozenset[str]:
    part = vars(module).get(PART)
    return frozenset() if part is None else part.added


def _calling_part(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _part_of(self, name).call(self, name, args, kwargs)

    return method


def _part_of(module: nn.Module, name: str) -> Any:
    """Raises ConfigError if `module` belongs to a folded network."""
    part = vars(module).get(PART)
    if part is None:
        raise ConfigError(
            f"{name} of a {type(module).__name__} in a folded network: call the network, or fold later"
        )
    return part


class PartMethod:
    """A method of a module that became part of a graph: stored on the instance, which keeps its class.

    Args:
        owner: the module.
        name: of the method.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.owner), self.name).__get__(self.owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _part_of(self.owner, self.name).call(self.owner, self.name, args, kwargs)


# Pickling ------------------------------------------------------------------------------------------


def is_importable(cls: type) -> bool:
    """Whether pickle finds `cls` by its name: not if it was defined in a function."""
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


class _Probe(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return "known" if isinstance(value, Tensor | nn.Module) else None


def _can_be_pickled(value: Any) -> bool:
    try:
        _Probe(io.BytesIO()).dump(value)
    except Exception:
        return False
    return True


def picklable(module: nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
    """`attributes`, of a dressed `module`, without those that cannot be pickled, such as lambdas.

    Modules that became part of the graph have been without class and attributes before; where theirs cannot
    be pickled, they are so again.
    """
    if PART not in vars(module):
        return attributes
    kept = {
        name: value
        for name, value in attributes.items()
        if name in _REGISTRIES or name.startswith("_graphmodule") or _can_be_pickled(value)
    }
    return kept | {"_modules": {name: _picklable_child(child) for name, child in module._modules.items()}}


_REGISTRIES = frozenset(vars(nn.Module()))


def _picklable_child(child: nn.Module | None) -> nn.Module | None:
    if child is None or PART not in vars(child) or isinstance(child, fx.GraphModule):
        return child
    kind = type(child) if is_importable(type(child)) else nn.Module
    copied = kind.__new__(kind)
    copied.__dict__.update(picklable(child, vars(child)))
    for name, value in vars(child).items():
        if kind is nn.Module and name not in _REGISTRIES:
            copied.__dict__.pop(name, None)
        elif isinstance(value, PartMethod):
            copied.__dict__[name] = PartMethod(copied, value.name)
    return copied
