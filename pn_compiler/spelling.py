"""One name for one operator, however a graph spells it: function, method or ATen overload."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_NAMESPACES = (F, torch, torch._C._nn, torch.special, operator)


def operator_name(node: fx.Node) -> str:
    """Name of the torch function, tensor method or ATen operator that `node` calls.

    ``F.relu(x)``, ``torch.relu(x)``, ``x.relu()`` and ``aten.relu.default(x)`` are all "relu"; those in
    place end in an underscore, and ``x += y`` is "iadd". Empty for anything else, such as a user's function.
    """
    target = node.target
    if node.op == "call_method":
        return str(target)
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__) if target.namespace == "aten" else ""
    if node.op == "call_function":
        name = getattr(target, "__name__", "")
        if any(getattr(namespace, name, None) is target for namespace in _NAMESPACES):
            return str(name)
    return ""


_IN_PLACE_OPERATORS = frozenset(
    f"i{name}"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
)
_ALIASING = frozenset(
    [
        "getitem", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze",
        "transpose", "permute", "movedim", "swapaxes", "swapdims", "t", "narrow", "select", "chunk", "split",
        "tensor_split", "unbind", "expand", "expand_as", "contiguous", "detach", "diagonal", "as_strided",
        "unfold", "alias", "to", "slice",
    ]
)  # fmt: skip


_MOVING = frozenset(
    [
        "contiguous", "flatten", "movedim", "permute", "reshape", "reshape_as", "squeeze", "swapaxes",
        "swapdims", "t", "transpose", "unflatten", "unsqueeze", "view", "view_as",
    ]
)  # fmt: skip


def moves_values(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether `node`, a call of `module` if it calls one, rearranges its input and changes no value."""
    if module is not None:
        return isinstance(module, nn.Flatten | nn.Unflatten | nn.PixelShuffle | nn.ChannelShuffle)
    return operator_name(node) in _MOVING and bool(node.all_input_nodes)


def reads_shape(node: fx.Node) -> bool:
    """Whether `node` reads the shape of its input, and no value: x.size(0), x.shape, len(x)."""
    if node.target is getattr:
        return node.args[1:] in (("shape",), ("ndim",))
    names = ("size", "sym_size", "dim", "ndimension", "numel", "nelement")
    return operator_name(node) in names or node.target is len


def overwritten(node: fx.Node) -> fx.Node | None:
    """The tensor that a function or method node overwrites: its input in place, or ``out=``; else None."""
    name = operator_name(node)
    target = node.kwargs.get("out")
    inplace = node.kwargs.get("inplace") is True
    if inplace or name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.startswith("_")):
        target = node.args[0] if node.args else node.kwargs.get("input")
    return target if isinstance(target, fx.Node) else None


def overwritten_by(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node overwrites: as `overwritten`, those of a list, one whose items are set."""
    if node.op not in ("call_function", "call_method"):
        return []
    target: Any = overwritten(node)
    name = getattr(node.target, "__name__", str(node.target))
    if target is None and node.args and (name == "setitem" or name.endswith("_")):
        target = node.args[0]
    targets = target if isinstance(target, list | tuple) else [target]
    return [item for item in targets if isinstance(item, fx.Node)]


_SAME_VALUES = frozenset(["data", "T", "mT", "H", "mH", "real", "imag"])


def source_of(node: fx.Node) -> str | None:
    """The path of the parameter or buffer whose memory `node` is, or is a view of; else None."""
    while node.op != "get_attr":
        alias = node.target is getattr and node.args[1] in _SAME_VALUES
        if not (alias or operator_name(node) in _ALIASING or overwritten(node) is not None):
            return None
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return None
        node = first
    return str(node.target)


def may_alias(source: fx.Node, before: fx.Node) -> bool:
    """Whether `source` shares memory with another tensor of the graph that was made earlier than `before`."""
    if operator_name(source) in _ALIASING:
        return True
    return any(user < before and operator_name(user) in _ALIASING for user in source.users)


def operands(node: fx.Node, *names: str) -> dict[str, Any]:
    """The operands of `node` after its input, by name: those in `names` order, then keywords."""
    return dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)


def flattens_channels(node: fx.Node) -> bool:
    """Whether a function or method node makes [N, C * S] of [N, C, *]."""
    name = operator_name(node)
    if name == "flatten":
        given = operands(node, "start_dim", "end_dim")
        return (given.get("start_dim"), given.get("end_dim", -1)) == (1, -1)
    if name in ("view", "reshape"):
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
            sizes = tuple(sizes[0])
        return len(sizes) == 2 and bool(sizes[1] == -1) and _is_batch_size(sizes[0])
    return False


def _is_batch_size(value: Any) -> bool:
    """Whether `value` is x.size(0) or x.shape[0] of some tensor."""
    if not isinstance(value, fx.Node):
        return False
    if operator_name(value) in ("size", "sym_size"):
        return value.args[1:] == (0,)
    if value.target is not operator.getitem or value.args[1] != 0:
        return False
    sizes = value.args[0]
    if not isinstance(sizes, fx.Node):
        return False
    return operator_name(sizes) == "size" or (sizes.target is getattr and sizes.args[1] == "shape")


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
    return tuple(dims), bool(given.get("keepdim", False))
