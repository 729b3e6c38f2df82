"""Whether a value of a graph is floating-point: activations of torch.nn do not accept integers or booleans.

It is known from example inputs or an exported program; otherwise it is derived from known operators.
"""

import operator

import torch
from torch import Tensor, fx, nn

from pn_compiler.graph.graph_utils import attribute_of, called_module
from pn_compiler.graph.ranks import dtype
from pn_compiler.inspection.hooks import may_change_calls
from pn_compiler.operators.op_names import reads_shape
from pn_compiler.operators.traits import function_name, traits_named


def is_floating(gm: fx.GraphModule, node: fx.Node) -> bool | None:
    """Whether the tensor of `node` is floating-point; None if that is not known."""
    value = node.meta.get("val")  # of an exported program
    known = value.dtype if isinstance(value, Tensor) else dtype(node)
    if known is not None:
        return known.is_floating_point
    return True if _is_certain(gm, node) else None


def _is_certain(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the operators that compute `node` guarantee that it is floating-point."""
    seen, remaining = set(), [node]
    while remaining:  # any of these is enough
        current = remaining.pop()
        if current in seen:
            continue
        seen.add(current)
        sources = _sources(gm, current)
        if sources is None:
            return True
        remaining += sources
    return False


def _sources(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node] | None:
    """The inputs of `node` of which one must be floating-point for `node` to be; None if it always is."""
    first = node.all_input_nodes[:1]
    module = called_module(gm, node)
    if module is not None:
        return _sources_of_module(module, first)
    if node.op == "get_attr":
        value = attribute_of(gm, node)
        return None if value is not None and value.is_floating_point() and value.dim() else []
    casts = any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
    if node.op not in ("call_function", "call_method") or casts or reads_shape(node):
        return []
    if node.target is operator.getitem:
        return first
    name = function_name(node).removesuffix("_")
    if name == "where":
        return node.all_input_nodes[1:]
    dtype_of = traits_named(name).dtype
    if dtype_of == "float" and "rounding_mode" not in node.kwargs:
        return None
    if dtype_of == "any":
        return node.all_input_nodes
    return first if dtype_of == "first" else []


def _sources_of_module(module: nn.Module, first: list[fx.Node]) -> list[fx.Node] | None:
    own = type(module).__module__
    if not own.startswith(("torch.nn.modules.", "pn_compiler.")) or may_change_calls(module):
        return []
    if getattr(module, "return_indices", False):
        return []
    parameter = next(module.parameters(), None)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) or parameter is not None:
        return None if parameter is None or parameter.is_floating_point() else []
    return first
