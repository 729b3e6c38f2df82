"""One name per operator, however a graph spells it: function, method or ATen overload."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from pn_compiler.operators import in_place

_NAMESPACES = (F, torch, torch._C._nn, torch.special, operator, in_place)


def operator_name(node: fx.Node) -> str:
    """Name of the torch function, tensor method or ATen operator that `node` calls.

    ``F.relu(x)``, ``torch.relu(x)``, ``x.relu()`` and ``aten.relu.default(x)`` are all "relu"; in-place
    operators end in an underscore, and ``x += y`` is "iadd". Anything else, such as a user's function, is "".
    """
    target = node.target
    if node.op == "call_method":
        return str(target)
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    if isinstance(packet, torch._ops.OpOverloadPacket):
        return str(packet.__name__) if packet._qualified_op_name.startswith("aten::") else ""
    if node.op == "call_function":
        name = getattr(target, "__name__", "")
        if any(getattr(namespace, name, None) is target for namespace in _NAMESPACES):
            return str(name)
    return ""


def reads_shape(node: fx.Node) -> bool:
    """Whether `node` reads only the shape of its input, no value: x.size(0), x.shape, len(x)."""
    if node.target is getattr:
        return node.args[1:] in (("shape",), ("ndim",))
    names = ("size", "sym_size", "dim", "ndimension", "numel", "nelement")
    return operator_name(node) in names or node.target is len


def counts_batches(node: fx.Node) -> bool:
    """Whether `node` adds a number to a num_batches_tracked, as a BatchNorm does in training."""
    return (
        operator_name(node) in ("add", "add_", "iadd", "__iadd__")
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op == "get_attr"
        and str(node.args[0].target).endswith("num_batches_tracked")
        and len(node.all_input_nodes) == 1
    )


def input_of(node: fx.Node) -> fx.Node | None:
    """The first operand of a function, method or layer, if a node computes it."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, fx.Node) else None


def operands(node: fx.Node, *names: str) -> dict[str, Any]:
    """The operands of `node` after its input, by name: positional ones in the order of `names`, keywords."""
    return dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)


def listed_sizes(node: fx.Node) -> tuple[Any, ...] | None:
    """The sizes in ``x.view(2, -1)``, ``x.view((2, -1))`` and the like; None if they are not listed."""
    sizes: Any = node.args[1:] or tuple(v for k, v in node.kwargs.items() if k in ("shape", "size"))
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
        return tuple(sizes[0])
    return sizes if len(sizes) > 1 or (sizes and isinstance(sizes[0], int)) else None


def reduced_dims(node: fx.Node) -> tuple[tuple[int, ...], bool] | None:
    """(dimensions, keepdim) if `node` is a mean over fixed dimensions, else None."""
    if operator_name(node) != "mean":
        return None
    given = operands(node, "dim", "keepdim")
    dims = given.get("dim")
    if isinstance(dims, int):
        dims = (dims,)
    if not isinstance(dims, Iterable) or not all(isinstance(d, int) for d in dims):
        return None
    return (tuple(dims), bool(given.get("keepdim", False))) if dims else None  # () stands for all
