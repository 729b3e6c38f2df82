"""Containers whose own methods see what the user put into them, not what a conversion has added."""

import collections
import functools
from collections.abc import Callable, Collection, ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LAZY = (Iterator, KeysView, ValuesView, ItemsView)


def container_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The container of torch.nn that `kind` is or derives from, or None."""
    return next((container for container in CONTAINERS if issubclass(kind, container)), None)


def container_methods(
    kind: type[nn.Module], added: Callable[[nn.Module], Collection[str]]
) -> Iterator[tuple[str, Any]]:
    """Name and function of each method that reads or edits the children of `kind`, if it is a container.

    Args:
        kind: a class of modules.
        added: returns the names of the children of an instance that its methods must not see.
    """
    container = container_of(kind)
    for name, function in () if container is None else vars(container).items():
        if callable(function) and name not in ("__init__", "__dir__", "forward"):
            yield name, _seeing_own(function, added, container)


def _seeing_own(
    function: Callable[..., Any], added: Callable[[nn.Module], Collection[str]], container: Any
) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: nn.Module, *args: Any) -> Any:
        names = added(self)
        hidden = {name: self._modules.pop(name) for name in list(self._modules) if name in names}
        try:
            if function.__name__ == "__getitem__" and args and isinstance(args[0], slice):
                return _slice(container, self._modules, args[0])
            result = function(self, *args)
            if not isinstance(result, _LAZY):
                return result
            return iter([*result]) if isinstance(result, Iterator) else [*result]
        finally:
            self._modules.update(hidden)

    return method


def _slice(container: Any, children: dict[str, nn.Module | None], chosen: slice) -> nn.Module:
    """Part of a container: a container of torch.nn, since a slice of a graph is none."""
    items = list(children.items())[chosen]
    ordered: nn.Module = container(
        collections.OrderedDict(items) if container is nn.Sequential else dict(items).values()
    )
    return ordered
