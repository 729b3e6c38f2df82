"""How many channels a value has, and which of them an operator takes or moves.

Every answer is exact or None: a channel too many in one branch shifts those of all branches behind it.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from pn_compiler.graph.graph_utils import attribute_of, called_module, operator_of, traits_of
from pn_compiler.graph.ranks import flattened_axes, rank, reads_batch, size_of
from pn_compiler.nn import FoldedNorm, Normalizer, ProxyNormAct
from pn_compiler.operators.op_names import input_of, listed_sizes, operands, operator_name


def channels_of(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """Size of the second dimension of `node`, [N, C, *], or None if unknown."""
    module = called_module(gm, node)
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels if reads_batch(gm, node, node) else None
    if isinstance(module, nn.GroupNorm | Normalizer | FoldedNorm):
        return module.num_channels
    if not node.all_input_nodes:
        return None
    if (branches := concatenated(node)) is not None:
        sizes = [channels_of(gm, branch) for branch in branches]
        return None if None in sizes else sum(size or 0 for size in sizes)
    if traits_of(gm, node).rank == "largest":
        return _channels_of_broadcast(gm, node)
    if (value := input_of(node)) is None:
        return None
    if node.target is operator.getitem and isinstance(called_module(gm, value), ProxyNormAct):
        return channels_of(gm, value)
    if node.target is operator.getitem or operator_name(node) == "narrow":
        return _channels_of_piece(gm, node, value)
    return channels_of(gm, value) if _keeps_channels(gm, node, value) else None


def _keeps_channels(gm: fx.GraphModule, node: fx.Node, value: fx.Node) -> bool:
    """Whether the second dimension of `node` is as long as that of `value`, its input."""
    traits = traits_of(gm, node)
    if traits.axes:
        return traits.channels and reads_batch(gm, node, value)
    return traits.channels and (not traits.resizes or (rank(value) or 0) > 2)


def _channels_of_broadcast(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """Of a sum or product of tensors, and numbers: that of all of them that have more than 1."""
    ranks = {source: rank(source) for source in node.all_input_nodes}
    dims = max((known or 0 for known in ranks.values()), default=0)
    tensors = [source for source, known in ranks.items() if known != 0]
    sizes = {_size_along_channels(gm, source, dims) for source in tensors}
    if None in ranks.values() or None in sizes or len(sizes - {1}) > 1:
        return None
    return max((size or 0 for size in sizes), default=None)


def _size_along_channels(gm: fx.GraphModule, node: fx.Node, dims: int) -> int | None:
    """How many channels `node` has where it meets tensors of `dims` dimensions, to which it broadcasts."""
    if (attribute := attribute_of(gm, node)) is not None:
        return int(attribute.shape[1 - dims]) if attribute.dim() >= dims - 1 > 0 else 1
    return channels_of(gm, node) if rank(node) == dims else None


def _channels_of_piece(gm: fx.GraphModule, node: fx.Node, source: fx.Node) -> int | None:
    index = node.args[1]
    if node.target is operator.getitem and isinstance(index, int) and source.all_input_nodes:
        whole = channels_of(gm, source.all_input_nodes[0])
        parts = None if whole is None else pieces(source, whole)
        if parts is None or not -len(parts) <= index < len(parts):
            return None
        return len(range(*parts[index].indices(whole or 0)))
    whole, taken = channels_of(gm, source), taken_channels(node)
    return None if whole is None or taken is None else len(range(*taken.indices(whole)))


def is_channel_axis(dim: Any, dims: int | None) -> bool:
    """Whether axis `dim` of a tensor of `dims` dimensions is that of the channels, 1."""
    return dim == 1 or (isinstance(dim, int) and dims is not None and dim == 1 - dims)


def concatenated(node: fx.Node) -> Sequence[fx.Node] | None:
    """The values that `node` concatenates along their channels, or None if it does something else."""
    if operator_name(node) not in ("cat", "concat", "concatenate") or node.kwargs.get("out") is not None:
        return None
    given = operands(node, "dim")
    branches = node.args[0] if node.args else node.kwargs.get("tensors")
    if not isinstance(branches, list | tuple):
        return None
    nodes = [branch for branch in branches if isinstance(branch, fx.Node)]
    if not nodes or len(nodes) != len(branches):
        return None
    return nodes if is_channel_axis(given.get("dim", given.get("axis")), rank(nodes[0])) else None


def pieces(node: fx.Node, num_channels: int) -> list[slice] | None:
    """The channels of each result of a chunk or split along them; None if `node` is none."""
    name = operator_name(node)
    first = {"chunk": "chunks", "split": "split_size_or_sections", "split_with_sizes": "split_sizes"}.get(
        name
    )
    if first is None:
        return None
    given = operands(node, first, "dim")
    amount = given.get(first, given.get("split_size"))
    if not node.all_input_nodes or not is_channel_axis(given.get("dim"), rank(node.all_input_nodes[0])):
        return None
    if isinstance(amount, list | tuple) and all(isinstance(size, int) for size in amount):
        ends = [sum(amount[: i + 1]) for i in range(len(amount))]
        return [slice(end - size, end) for end, size in zip(ends, amount, strict=True)]
    if not isinstance(amount, int) or amount < 1:
        return None
    size = math.ceil(num_channels / amount) if name == "chunk" else amount
    return [slice(start, min(start + size, num_channels)) for start in range(0, num_channels, size)]


def taken_channels(node: fx.Node) -> slice | None:
    """The channels in x[:, a:b:c, ...] with constant bounds, whatever the pixels; None if it is none."""
    if operator_name(node) == "narrow":
        return _narrowed_channels(node)
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or len(index) < 2 or index[0] != slice(None):
        return None
    spatial = all(part is Ellipsis or isinstance(part, slice) for part in index[2:])
    channels = index[1]
    if not spatial or not isinstance(channels, slice):
        return None
    bounds = (channels.start, channels.stop, channels.step)
    return channels if all(bound is None or isinstance(bound, int) for bound in bounds) else None


def _narrowed_channels(node: fx.Node) -> slice | None:
    given = operands(node, "dim", "start", "length")
    start, length = given.get("start"), given.get("length")
    if not node.args or not is_channel_axis(given.get("dim"), rank(node.all_input_nodes[0])):
        return None
    if not (isinstance(start, int) and isinstance(length, int) and start >= 0):
        return None
    return slice(start, start + length)


def resizes(gm: fx.GraphModule, node: fx.Node, value: fx.Node) -> bool:
    """Whether `node` computes averages of values of one channel of `value`, with weights that add up to 1."""
    if not node.args or node.args[0] is not value:
        return False
    traits, dims = traits_of(gm, node), rank(value)
    if traits.resizes:
        return reads_batch(gm, node, value) if traits.axes else (dims or 0) > 2
    if operator_name(node) != "pad":
        return False
    given = operands(node, "pad", "mode")
    amounts = given.get("pad")
    inside = dims is not None and isinstance(amounts, list | tuple) and len(amounts) <= 2 * (dims - 2)
    return inside and given.get("mode") in ("reflect", "replicate", "circular")


def transposed(node: fx.Node, dims: int) -> list[int] | None:
    """For each axis of `node` that of its input, of `dims` dimensions; None if `node` is no transposition."""
    name, order = operator_name(node), list(range(dims))
    if name == "permute":
        given = node.args[1:] or tuple(node.kwargs.values())
        flat = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
        axes = [axis % dims for axis in flat if isinstance(axis, int)]
        return axes if sorted(axes) == order else None
    if name not in ("transpose", "swapaxes", "swapdims"):
        return None
    pair = [axis for axis in (*node.args[1:], *node.kwargs.values()) if isinstance(axis, int)]
    if len(pair) != 2:
        return None
    one, other = (axis % dims for axis in pair)
    order[one], order[other] = order[other], order[one]
    return order


def joins_pixels(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` makes [N, C, S] of [N, C, *]."""
    return operator_of(gm, node) == "flatten" and flattened_axes(gm, node) == (2, -1)


def shuffled(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, int] | None:
    """(last node, groups) of a channel shuffle that begins with `node`, or None.

    It is a ``nn.ChannelShuffle``, or view(N, G, C / G, H, W), transpose(1, 2), contiguous, view(N, C, H, W)
    with N and C read from the value itself.
    """
    module = called_module(gm, node)
    if isinstance(module, nn.ChannelShuffle) and operator_of(gm, node):
        return node, module.groups
    chain = [node]
    for names in (("transpose",), ("contiguous",), ("view", "reshape")):
        users = list(chain[-1].users)
        if len(users) != 1 or operator_name(users[0]) not in names:
            return None
        chain.append(users[0])
    before, after = listed_sizes(node) or (), listed_sizes(chain[-1]) or ()
    if operator_name(node) not in ("view", "reshape") or len(before) != 5 or len(after) != 4:
        return None
    same = (before[0], *before[3:]) == (after[0], *after[2:])
    if not same or chain[1].args[1:] != (1, 2) or not isinstance(before[1], int):
        return None
    value = node.all_input_nodes[0]
    whole = size_of(before[0], 0) is value and _is_share(before[2], value, before[1])
    return (chain[-1], before[1]) if whole else None


def _is_share(size: Any, value: fx.Node, groups: int) -> bool:
    """Whether `size` is the number of channels of `value`, divided by `groups`."""
    if not isinstance(size, fx.Node) or operator_name(size) not in ("floordiv", "truediv", "div"):
        return False
    return len(size.args) == 2 and size_of(size.args[0], 1) is value and size.args[1] in (groups,)
