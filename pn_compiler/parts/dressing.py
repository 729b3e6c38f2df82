"""Gives a converted network the classes, attributes and methods of the one that it was made from."""

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn

from pn_compiler.graph.graph_module import ConvertedModule
from pn_compiler.graph.own_class import PART, PartMethod, own_methods, take_class
from pn_compiler.graph.own_containers import container_of
from pn_compiler.inspection.hooks import HOOKS_AND_OPTIONS
from pn_compiler.operators.activations import is_activation
from pn_compiler.parts.borders import border_sites
from pn_compiler.parts.installing import move_to_root, uncover
from pn_compiler.parts.originals import Original
from pn_compiler.parts.part import Part
from pn_compiler.parts.structure import Absorbed, Uncalled, is_part, module_at, parts_of
from pn_compiler.regions.regions import Trace
from pn_compiler.running.inputs import Inputs

_REGISTERED = frozenset(vars(nn.Module())) - {"training"}


def dress(traced: Trace, structure: nn.Module | None, inputs: Inputs | None) -> None:
    """Dresses each graph of a converted network.

    Modules that became part of a graph have left nothing but a ``nn.Module`` around what the graph calls.
    They get their class and attributes back, and methods that compute what they did in the graph.

    Args:
        traced: of a network, converted.
        structure: that of the original network, on the meta device; None if there is none.
        inputs: the arguments that it was traced with.
    """
    on_meta = None if inputs is None else inputs.on_meta()
    for region in traced.regions:
        if region.source is None or region.owner is not None:
            continue
        prefix = region.prefix
        entered = frozenset(p.removeprefix(prefix) for p in traced.entered if p.startswith(prefix))
        part = None if structure is None else module_at(structure, prefix.removesuffix("."))
        _dress(region.gm, region.source, part, entered, None if prefix else on_meta)


def _dress(
    gm: ConvertedModule,
    source: nn.Module,
    structure: nn.Module | None,
    entered: frozenset[str],
    inputs: Inputs | None,
) -> None:
    kinds: dict[str, type[nn.Module]] = {}
    parts: set[str] = set()
    original = Original(structure, inputs, kinds, parts, entered)  # filled below
    _fill(gm, source, original, "", {})
    move_to_root(gm, _added(gm, source))
    uncover(gm, source, _added(gm, source))
    gm.recompile()
    original.feeds.update(border_sites(gm))
    kinds.update((path, _kind(module)) for path, module in _inside_parts(gm))
    _give_attributes(gm, gm, source)
    take_class(gm, ConvertedModule, type(source))
    part = vars(gm)[PART] = Part(original, "", _added(gm, source))
    part.look(gm)


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class of `module`; each graph has one of its own, which copies of it do not have."""
    return fx.GraphModule if isinstance(module, fx.GraphModule) else type(module)


def _inside_parts(gm: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each child of the graph and of its parts."""
    for path, part in parts_of(gm):
        for name, child in part._modules.items():
            if child is not None:
                yield f"{path}.{name}" if path else name, child


def _added(gm: nn.Module, source: nn.Module) -> frozenset[str]:
    return frozenset(path for path, _ in _inside_parts(gm) if module_at(source, path) is None)


def _fill(
    converted: nn.Module, source: nn.Module, original: Original, prefix: str, made: dict[int, nn.Module]
) -> None:
    """Gives `converted`, a module that became part of a graph or the graph, the children of `source`."""
    children = dict(converted._modules)
    keeps_positions = container_of(type(source)) is not None
    for name, child in source._modules.items():
        path = prefix + name
        if child is None:
            children[name] = None
            continue
        now = children.get(name)
        if (type(now) is nn.Module and type(child) is not nn.Module) or (
            now is None and path in original.entered
        ):
            part = made.get(id(child))
            if part is None:
                part = made[id(child)] = _part_like(child, now or nn.Module())
                _fill(part, child, original, f"{path}.", made)
                vars(part)[PART] = Part(original, path)
            original.parts.add(path)
            children[name] = part
        elif now is None:
            replaced = _in_place_of(child, keeps_positions=keeps_positions)
            if replaced is not None:
                children[name] = replaced
    in_order = [name for name in source._modules if name in children]
    rest = [name for name in children if name not in source._modules]
    converted._modules = {name: children[name] for name in (*in_order, *rest)}


def _in_place_of(child: nn.Module, *, keeps_positions: bool) -> nn.Module | None:
    """What stands for a module that the graph does not call."""
    if is_activation(child):
        return Absorbed(type(child).__name__)
    if not [*child.parameters(), *child.buffers()]:
        return child
    return Uncalled(type(child).__name__) if keeps_positions else None


def _part_like(source: nn.Module, holder: nn.Module) -> nn.Module:
    """A module of the class of `source` that holds what `holder` does."""
    # what torch.compile wrapped has properties that need what it wrapped
    plain = isinstance(source, fx.GraphModule) or "_orig_mod" in source._modules
    kind = nn.Module if plain else type(source)
    part = kind.__new__(kind)
    part.__dict__.update(vars(nn.Module()))
    part._parameters, part._buffers, part._modules = holder._parameters, holder._buffers, holder._modules
    part._non_persistent_buffers_set = source._non_persistent_buffers_set & set(holder._buffers)
    part.training = holder.training
    return part


def _give_attributes(gm: ConvertedModule, converted: nn.Module, source: nn.Module) -> None:
    """Gives `converted` and the parts inside it the attributes and methods of `source`."""
    memo: dict[int, Any] = {}
    for path, module in source.named_modules(remove_duplicate=False):
        now = module_at(converted, path)
        if now is not None and not isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = now
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                memo[id(tensor)] = now._parameters.get(name, now._buffers.get(name, tensor))
    for path, module in source.named_modules(remove_duplicate=False):
        now = module_at(converted, path)
        plain = now is None or type(now) is nn.Module  # a graph in the network, or nothing but children
        if now is not None and not plain and (now is converted or is_part(now)):
            _copy_attributes(now, module, memo)
            if now is not converted:
                for name in _methods_of_part(type(module)):
                    vars(now)[name] = PartMethod(now, name)


def _methods_of_part(kind: type[nn.Module]) -> Collection[str]:
    own = [name for name, _ in own_methods(kind)]
    return own if kind in (nn.ModuleList, nn.ModuleDict) else [*own, "forward"]


def _copy_attributes(now: nn.Module, source: nn.Module, memo: dict[int, Any]) -> None:
    for name, value in vars(source).items():
        if name in _REGISTERED or name in HOOKS_AND_OPTIONS or name in ("training", "forward"):
            continue
        if name not in vars(now):
            try:
                vars(now)[name] = copy.deepcopy(value, memo)
            except Exception:  # it is no part of what the network computes
                vars(now)[name] = value
