"""Helpers for torch.fx graphs, shared by several passes."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from torch import fx, nn

from pn_compiler.inspection.hooks import may_change_calls
from pn_compiler.operators.activations import activation_of, is_activation
from pn_compiler.operators.traits import SAME, Traits, function_name, layer_name, traits_named


def called_module(graph: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that `node` calls, or None."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def attribute_of(gm: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """The parameter or buffer that `node` reads, or None."""
    if node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(gm.get_submodule(owner), name, None)
    return value if isinstance(value, torch.Tensor) else None


def operator_of(gm: fx.GraphModule, node: fx.Node) -> str:
    """The name, in the table of traits, of the function, method or layer that `node` calls; "" if unknown."""
    module = called_module(gm, node)
    if module is None:
        return function_name(node)
    if "forward" in vars(module) or may_change_calls(module):
        return ""
    name = layer_name(type(module))  # type: ignore[arg-type]  # classes are hashable
    return f"{name}_with_indices" if getattr(module, "return_indices", False) else name


def traits_of(gm: fx.GraphModule, node: fx.Node) -> Traits:
    """What is known of the operator that `node` calls."""
    module = called_module(gm, node)
    if module is None:
        return (
            SAME if activation_of(node) is not None else traits_named(function_name(node).removesuffix("_"))
        )
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # or one with an activation in it
        return traits_named("batch_norm")
    plain = "forward" not in vars(module) and not may_change_calls(module)
    return SAME if plain and is_activation(module) else traits_named(operator_of(gm, node))


def moves_values(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` rearranges its input and changes no value."""
    reinterprets = any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
    return traits_named(operator_of(gm, node)).moves and bool(node.all_input_nodes) and not reinterprets


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
