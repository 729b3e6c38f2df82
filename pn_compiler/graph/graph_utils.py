"""Helpers for torch.fx graphs, shared by several passes."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from torch import fx, nn


def called_module(graph: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that `node` calls, or None."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def module_calls(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Path of each called module -> its call sites, in graph order."""
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
    return dict(calls)


def add_module(gm: fx.GraphModule, path: str, module: nn.Module) -> str:
    """Adds `module` at `path`, with a number appended if the path is taken; returns the path used."""
    candidate, number = path, 0
    while _has_attribute(gm, candidate):
        number += 1
        candidate = f"{path}_{number}"
    gm.add_submodule(candidate, module)
    return candidate


def _has_attribute(root: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    try:
        return hasattr(root.get_submodule(parent), name)
    except AttributeError:
        return False


def replace_module(gm: fx.GraphModule, path: str, module: nn.Module) -> None:
    """Replaces the module at `path` by `module`, in the same train/eval mode."""
    module.train(gm.get_submodule(path).training)
    gm.set_submodule(path, module)


def call_module_after(
    gm: fx.GraphModule, after: fx.Node, path: str, args: tuple[fx.Node | None, ...]
) -> fx.Node:
    """Inserts a call of the module at `path` right after `after`, with its metadata."""
    with gm.graph.inserting_after(after):
        node = gm.graph.call_module(path, args)
    node.meta = dict(after.meta)
    return node


def count_parameters(model: nn.Module) -> int:
    """Number of values in the parameters of `model`."""
    return sum(p.numel() for p in model.parameters())


def count_operators(graphs: Iterable[fx.GraphModule]) -> dict[str, int]:
    """Operators of a traced model: class names of modules, names of functions and methods."""
    names: Counter[str] = Counter()
    for gm in graphs:
        for node in gm.graph.nodes:
            module = called_module(gm, node)
            if module is not None:
                names[type(module).__name__] += 1
            elif node.op in ("call_function", "call_method"):
                names[getattr(node.target, "__name__", str(node.target))] += 1
    return dict(sorted(names.items()))
