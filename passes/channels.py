"""How many channels a value has, and which of them an operator takes or moves."""

import math
import operator
from collections.abc import Sequence

from torch import fx, nn

from pn_compiler.activations import is_activation
from pn_compiler.graph_utils import called_module
from pn_compiler.nn import ChannelAffine, ProxyNormAct
from pn_compiler.ranks import rank
from pn_compiler.spelling import operands, operator_name

_RESIZES = (
    nn.Upsample,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
)
_KEEP_CHANNELS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.dropout._DropoutNd,
    nn.Identity,
    ChannelAffine,
)
_KEEP_CHANNELS_NAMES = frozenset(
    ["add", "iadd", "contiguous", "interpolate", "relu"]
    + [f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)]
)


def channels_of(graph: fx.GraphModule, node: fx.Node) -> int | None:
    """Size of the second dimension of `node`, [N, C, *], or None if unknown."""
    module = called_module(graph, node)
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    if isinstance(module, nn.GroupNorm | ProxyNormAct):
        return module.num_channels
    name = operator_name(node)
    if (branches := concatenated(node)) is not None:
        sizes = [channels_of(graph, branch) for branch in branches]
        return None if None in sizes else sum(size or 0 for size in sizes)
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        if isinstance(called_module(graph, source), ProxyNormAct):
            return channels_of(graph, source)
        return _channels_of_piece(graph, node, source)
    keeps = isinstance(module, (*_KEEP_CHANNELS, *_RESIZES)) or (module is not None and is_activation(module))
    if keeps or name in _KEEP_CHANNELS_NAMES:
        known = [channels_of(graph, n) for n in node.all_input_nodes if (rank(n) or 0) > 2]
        return max((size for size in known if size is not None), default=None)
    return None


def _channels_of_piece(graph: fx.GraphModule, node: fx.Node, source: fx.Node) -> int | None:
    index = node.args[1]
    if isinstance(index, int) and source.all_input_nodes:
        whole = channels_of(graph, source.all_input_nodes[0])
        parts = None if whole is None else pieces(source, whole)
        return None if parts is None else len(range(*parts[index].indices(whole or 0)))
    whole, taken = channels_of(graph, source), taken_channels(node)
    return None if whole is None or taken is None else len(range(*taken.indices(whole)))


def concatenated(node: fx.Node) -> Sequence[fx.Node] | None:
    """The values that `node` concatenates along their channels, or None if it does something else."""
    if operator_name(node) not in ("cat", "concat", "concatenate") or len(node.args) not in (1, 2):
        return None
    given = operands(node, "dim")
    branches = node.args[0]
    if given.get("dim", given.get("axis")) != 1 or not isinstance(branches, list | tuple):
        return None
    nodes = [branch for branch in branches if isinstance(branch, fx.Node)]
    return nodes if len(nodes) == len(branches) else None


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
    if given.get("dim") != 1:
        return None
    if isinstance(amount, list | tuple) and all(isinstance(size, int) for size in amount):
        ends = [sum(amount[: i + 1]) for i in range(len(amount))]
        return [slice(end - size, end) for end, size in zip(ends, amount, strict=True)]
    if not isinstance(amount, int):
        return None
    size = math.ceil(num_channels / amount) if name == "chunk" else amount
    return [slice(start, min(start + size, num_channels)) for start in range(0, num_channels, size)]


def taken_channels(node: fx.Node) -> slice | None:
    """The channels in x[:, a:b, ...] with constant a and b, whatever the pixels; None if it is none."""
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or len(index) < 2 or index[0] != slice(None):
        return None
    spatial = all(part is Ellipsis or isinstance(part, slice) for part in index[2:])
    channels = index[1]
    if not spatial or not isinstance(channels, slice):
        return None
    constant = all(bound is None or isinstance(bound, int) for bound in (channels.start, channels.stop))
    return channels if constant and channels.step in (None, 1) else None


def resizes(graph: fx.GraphModule, node: fx.Node, value: fx.Node) -> bool:
    """Whether `node` computes averages of values of one channel of `value`, with weights that add up to 1."""
    if not node.args or node.args[0] is not value:
        return False
    if isinstance(called_module(graph, node), _RESIZES) or operator_name(node) == "interpolate":
        return True
    if operator_name(node) != "pad":
        return False
    given, dims = operands(node, "pad", "mode"), rank(value)
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


def joins_pixels(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` makes [N, C, S] of [N, C, *]."""
    module = called_module(graph, node)
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (2, -1)
    given = operands(node, "start_dim", "end_dim")
    return operator_name(node) == "flatten" and (given.get("start_dim"), given.get("end_dim", -1)) == (2, -1)


def shuffled(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, int] | None:
    """(last node, groups) of a channel shuffle that begins with `node`, or None.

    It is a ``nn.ChannelShuffle``, or view(N, G, C / G, H, W), transpose(1, 2), contiguous, view(N, C, H, W).
    """
    module = called_module(graph, node)
    if isinstance(module, nn.ChannelShuffle):
        return node, module.groups
    chain = [node]
    for names in (("transpose",), ("contiguous",), ("view", "reshape")):
        users = list(chain[-1].users)
        if len(users) != 1 or operator_name(users[0]) not in names:
            return None
        chain.append(users[0])
    before, after = node.args[1:], chain[-1].args[1:]
    if operator_name(node) not in ("view", "reshape") or len(before) != 5 or len(after) != 4:
        return None
    same = (before[0], *before[3:]) == (after[0], *after[2:])
    if not same or chain[1].args[1:] != (1, 2) or not isinstance(before[1], int):
        return None
    return chain[-1], before[1]
