"""Edits the graph of a converted network after the user has changed its modules."""

import operator
from collections.abc import Collection
from typing import Any

from torch import fx, nn

from pn_compiler.graph.graph_module import ConvertedModule
from pn_compiler.graph.graph_utils import add_module, called_module, module_calls
from pn_compiler.nn import ChannelAffine, ProxyNormAct
from pn_compiler.parts.structure import is_part, module_at


def reopen(
    gm: ConvertedModule, changed: Collection[str], kinds: dict[str, type[nn.Module]]
) -> frozenset[str] | None:
    """Applies scale and shift in front of modules that were put in the place of one that absorbed them.

    Returns:
        Paths of the modules that were added; None if more than modules that the graph calls whole changed.
    """
    graph = gm._graph  # `graph` would refresh it
    calls = [node for node in graph.nodes if node.op == "call_module"]
    reads = {str(node.target).rpartition(".")[0] for node in graph.find_nodes(op="get_attr")}
    called = {str(node.target) for node in calls} - reads
    if not changed or any(module_at(gm, path) is None for path in called):
        return None
    for path in changed:
        kind = kinds.get(path, nn.Module)
        if path not in called or issubclass(kind, ProxyNormAct) or is_part(module_at(gm, path)):
            return None
    added = set()
    for call in calls:
        if call.target in changed and len(call.args) == 3 and _is_shift(gm, call.args[2]):
            at = add_module(gm, f"{str(call.target).replace('.', '_')}_affine", ChannelAffine())
            added.add(at)
            with graph.inserting_before(call):
                call.args = (graph.call_module(at, call.args),)
    graph.lint()
    gm.recompile()
    return frozenset(added)


def _is_shift(gm: ConvertedModule, value: Any) -> bool:
    """Whether `value` is the shift of a site."""
    if not isinstance(value, fx.Node) or value.target is not operator.getitem:
        return False
    site, index = called_module(gm, value.args[0]), value.args[1]  # type: ignore[arg-type]  # a node
    return isinstance(site, ProxyNormAct) and site.outputs[index] == "shift"  # type: ignore[index]


def install(gm: ConvertedModule, followed: ConvertedModule, added: Collection[str]) -> frozenset[str]:
    """Gives `gm` the graph `followed`, and the modules that this has beside those of `gm`.

    Args:
        gm: keeps its own modules.
        followed: used up.
        added: paths of the modules that earlier conversions have added; those not needed any more go.

    Returns:
        Paths of the modules that are added now.
    """
    fresh = [path for path in module_calls(followed) if module_at(gm, path) is not module_at(followed, path)]
    uncover(followed, gm, fresh)
    targets = module_calls(followed)
    new: set[str] = set()
    for path in targets:
        module = followed.get_submodule(path)
        if module_at(gm, path) is not module:
            new.add(path)
            gm.add_submodule(path, module)
    for path in set(added) - set(targets):
        if module_at(gm, path) is not None:
            gm.delete_submodule(path)
    for node in followed.graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        holder = gm.get_submodule(owner)
        if not hasattr(holder, name):
            setattr(holder, name, getattr(followed.get_submodule(owner), name))
    gm.graph = followed._graph
    return frozenset(new) | frozenset(path for path in added if path in targets)


def move_to_root(gm: ConvertedModule, added: Collection[str]) -> None:
    """Moves those at the paths `added` that are beside the children of a container to the graph itself."""
    for path, calls in module_calls(gm).items():
        if "." in path and path in added:
            _move(gm, path, calls, path.replace(".", "_"))


def uncover(gm: fx.GraphModule, source: nn.Module, added: Collection[str]) -> None:
    """Renames those at the paths `added` that an attribute or method of the user's would hide.

    The code of a graph reads ``self.relu``, which finds a method of that name before the module.

    Args:
        source: has the classes and attributes that `gm` gets.
    """
    for path, calls in module_calls(gm).items():
        parent, _, name = path.rpartition(".")
        holder = module_at(source, parent)
        if path not in added or holder is None or not _hides(holder, name):
            continue
        free = f"{path.replace('.', '_')}_added"
        while _hides(source, free):
            free += "_"
        _move(gm, path, calls, free)


def _move(gm: fx.GraphModule, path: str, calls: Collection[fx.Node], name: str) -> None:
    """Moves the module at `path` to the graph itself, unless it holds what stands in checkpoints by name."""
    parent, _, own = path.rpartition(".")
    holder, module = module_at(gm, parent), module_at(gm, path)  # an attribute may hide it
    assert holder is not None
    assert module is not None
    if [*module.parameters(), *module.buffers()]:
        return
    at = add_module(gm, name, module)
    for call in calls:
        call.target = at
    del holder._modules[own]


def _hides(holder: nn.Module, name: str) -> bool:
    return hasattr(type(holder), name) or name in vars(holder)
