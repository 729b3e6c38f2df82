"""The structure of the original network with what the user has put into the converted one since."""

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn

from pn_compiler.base.errors import TraceError
from pn_compiler.graph.own_class import PART
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.nn import INPUT_AFFINE, Normalizer


class Foreign(nn.Module):
    """Stands in a structure for a module that the user has put into the converted network."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TraceError("a module that was put in later is called whole")


class Stand(nn.Module):
    """In the place of a module that the graph does not call.

    Args:
        kind: name of the class of that module.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def extra_repr(self) -> str:
        return self.kind


class Absorbed(Stand, nn.Identity):
    """In the place of an activation that is part of the site in front of it."""


class Uncalled(Stand):
    """Keeps the place in a container of a module that the traced forward never calls."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"this {self.kind} is not part of the converted network: the traced forward never calls it"
        )


def is_part(module: nn.Module | None) -> bool:
    """Whether `module` became part of the graph around it, and is no graph itself."""
    return module is not None and PART in vars(module) and not isinstance(module, fx.GraphModule)


def module_at(root: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` in `root`, or None."""
    for name in path.split(".") if path else ():
        found = None if isinstance(root, torch.jit.ScriptModule) else root._modules.get(name)
        if found is None:
            return None
        root = found
    return root


class Structure:
    """A copy of the original structure that fits the modules of `converted`.

    Args:
        original: on the meta device; left as it is.
        converted: the graph, or a part of it.
        kinds: class of each module in `converted` when it was made, by path in it.
        parts: paths of modules that became part of the graph.
        added: paths of modules that the conversion has made, and the original does not have.
        entered: paths of the modules whose forward became part of the graph.
        deaf: paths of parts whose hooks are not called.
        base: what the path of `converted` adds to those in it, in the network; "" or "a.b.".

    Attributes:
        root: the copy.
        whole: paths of modules that are called as they are.
    """

    def __init__(
        self,
        original: nn.Module,
        converted: nn.Module,
        kinds: dict[str, type[nn.Module]],
        *,
        parts: Collection[str],
        added: frozenset[str],
        entered: frozenset[str],
        deaf: frozenset[str] = frozenset(),
        base: str = "",
    ) -> None:
        self._kinds, self._parts, self._added, self._entered = kinds, parts, added, entered
        self._deaf, self._base = deaf, base
        self.root = copy.deepcopy(original)
        self.whole: set[str] = set()
        self._fit(self.root, converted, "")

    def _fit(self, structure: nn.Module, converted: nn.Module, prefix: str) -> None:
        """Makes the children of `structure` those of `converted`."""
        for name in list(structure._modules):
            path = prefix + name
            if converted._modules.get(name) is None and path in self._kinds:
                del structure._modules[name]
        for name, module in converted._modules.items():
            path = prefix + name
            if module is None or path in self._added:
                continue
            child = structure._modules.get(name)
            if child is None or not _is_as_made(module, path, self._kinds, self._parts, self._base):
                _refuse_moved(module, path)
                structure._modules[name] = Foreign()
                self.whole.add(path)
            elif is_part(module):
                self._fit(child, module, f"{path}.")
                self.whole |= {path} if has_hooks(module) and path not in self._deaf else set()
            elif path not in self._entered and not isinstance(module, Normalizer | nn.GroupNorm | Absorbed):
                self.whole.add(path)
        in_order = [n for n in converted._modules if n in structure._modules]
        rest = [n for n in structure._modules if n not in converted._modules]
        structure._modules = {name: structure._modules[name] for name in (*in_order, *rest)}


def _refuse_moved(module: nn.Module, path: str) -> None:
    moved = is_part(module) or isinstance(module, Normalizer | Absorbed)
    if moved or isinstance(module, tuple(INPUT_AFFINE.values())):
        raise TraceError(
            f"PN217 {path}: a converted {type(module).__name__} was moved there from another place, for "
            "which it was made; change the network first and convert it then"
        )


def changes(
    converted: nn.Module, kinds: dict[str, type[nn.Module]], parts: Collection[str], added: frozenset[str]
) -> set[str]:
    """Paths in a graph at which the user has put, taken away, moved or hooked something since it was made."""
    found = set()
    for path in kinds:
        parent, _, name = path.rpartition(".")
        holder = module_at(converted, parent)
        if holder is not None and holder._modules.get(name) is None:
            found.add(path)
    for path, module in parts_of(converted):
        if path and has_hooks(module):
            found.add(path)
        for name, child in module._modules.items():
            inside = f"{path}.{name}" if path else name
            if child is not None and inside not in added and not _is_as_made(child, inside, kinds, parts):
                found.add(inside)
    return found


def _is_as_made(
    module: nn.Module, path: str, kinds: dict[str, type[nn.Module]], parts: Collection[str], base: str = ""
) -> bool:
    """Whether `module` is like that which the conversion has left at `path`."""
    if path in parts or is_part(module):
        return is_part(module) and vars(module)[PART].path == base + path
    return isinstance(module, kinds.get(path, ()))


def parts_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`module` and the parts of its graph inside it, with their paths."""
    yield prefix.removesuffix("."), module
    for name, child in module._modules.items():
        if child is not None and is_part(child):
            yield from parts_of(child, f"{prefix}{name}.")
