"""The pass that moves the scale and shift of sites through operators that commute with them, and branches."""

import dataclasses
import operator
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from pn_compiler.graph.graph_utils import called_module, operator_of
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.graph.ranks import flattens_channels, rank
from pn_compiler.nn import ChannelAffine, ProxyNormAct
from pn_compiler.operators.op_names import operator_name, reads_shape
from pn_compiler.passes.absorption import Router, commutes, put_into
from pn_compiler.passes.channels import (
    channels_of,
    concatenated,
    joins_pixels,
    pieces,
    resizes,
    shuffled,
    taken_channels,
    transposed,
)
from pn_compiler.passes.route_affine import RouteAffine
from pn_compiler.passes.site_outputs import chain_between, site_outputs, where_it_went


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The affine still to be applied to the value of a node: x * scale + shift.

    Attributes:
        scale, shift: [C], float64.
        sources: the nodes that the scale and shift come from.
        flat: whether the value is [N, C * S], flattened from [N, C, *].
        axis: axis of the channels.
    """

    scale: Tensor
    shift: Tensor
    sources: frozenset[fx.Node]
    flat: bool = False
    axis: int = 1

    def take(self, channels: slice | Tensor) -> "_Pair":
        return dataclasses.replace(self, scale=self.scale[channels], shift=self.shift[channels])


class SinkAffine(GraphPass):
    """Moves constant scales and shifts through concatenations, sums, slices and transpositions.

    Given:   cat(ProxyNormAct(x), y) -> maxpool -> conv1x1     Result:  cat(act(gn(x)), y) -> maxpool -> conv'
             ChannelAffine(a, r, v) + y -> conv1x1             a + y -> conv', if r = 1
    Leaves alone: those of which some part would still have to be applied, because a reader is not linear,
        pads with zeros, or adds a value with another scale.
    Outputs: preserved to rounding, in eval mode only.
    Source: docs/method.md, "Folding".
    """

    runs_after = (RouteAffine,)
    preserves_outputs = True

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        router = Router(gm, through_padding=False)
        sources = _sources(gm)
        while True:
            flow = _Flow(gm, router, sources)
            flow.run()
            if not flow.blocked:
                break
            sources = {node: pair for node, pair in sources.items() if node not in flow.blocked}
        for absorber, pair in flow.absorbers.items():
            put_into(gm, absorber, pair.scale, pair.shift)
        notes = []
        for source in sources:
            ends = [node for node, pair in flow.absorbers.items() if source in pair.sources]
            notes.append(where_it_went(_site_of(gm, source), "into", ends))
            _drop(gm, source)
        return PassResult(len(sources), tuple(notes))


def _sources(gm: fx.GraphModule) -> dict[fx.Node, _Pair]:
    """Where a scale and shift are applied now: whole sites, and ChannelAffines without a gate."""
    result: dict[fx.Node, _Pair] = {}
    calls = Counter(node.target for node in gm.graph.nodes if node.op == "call_module")
    for node in gm.graph.nodes:
        module = called_module(gm, node)
        if isinstance(module, ProxyNormAct) and "output" in module.outputs and calls[node.target] == 1:
            reads = site_outputs(gm, node)["output"]
            if len(reads) == 1:
                result[reads[0]] = _pair(module, reads[0], scaled=not module.scales_affine)
        elif isinstance(module, ChannelAffine) and len(node.args) == 3:
            _, scale, shift = node.args
            site = called_module(gm, shift.args[0]) if isinstance(shift, fx.Node) else None  # type: ignore[arg-type]
            if isinstance(site, ProxyNormAct):
                result[node] = _pair(site, node, scaled=scale is not None)
    return result


def _pair(site: ProxyNormAct, source: fx.Node, *, scaled: bool) -> _Pair:
    scale, shift = site.scale_and_shift(torch.float64)
    scale = scale if scaled else torch.ones_like(scale)
    return _Pair(scale, shift, frozenset([source]), flat=rank(source) == 2)


def _site_of(gm: fx.GraphModule, source: fx.Node) -> str:
    """Path of the site whose scale and shift `source` applies."""
    module = called_module(gm, source)
    if isinstance(module, ProxyNormAct):
        return str(source.target)
    read = source.args[2] if isinstance(module, ChannelAffine) else source
    assert isinstance(read, fx.Node)
    return str(read.all_input_nodes[0].target)


def _drop(gm: fx.GraphModule, source: fx.Node) -> None:
    """Makes readers of `source` read the activation, without scale and shift."""
    module = called_module(gm, source)
    if isinstance(module, ChannelAffine):
        value = source.args[0]
        assert isinstance(value, fx.Node)
        source.replace_all_uses_with(value)
        gm.graph.erase_node(source)
        return
    call = source if isinstance(module, ProxyNormAct) else source.all_input_nodes[0]
    site = called_module(gm, call)
    assert isinstance(site, ProxyNormAct)
    site.outputs = tuple("activation" if name == "output" else name for name in site.outputs)


class _Flow:
    """One walk over a graph that finds where the pairs of `sources` end.

    Attributes:
        absorbers: the linear operators that can absorb a pair -> that pair.
        blocked: the sources of which some part reaches anything else.
    """

    def __init__(self, gm: fx.GraphModule, router: Router, sources: dict[fx.Node, _Pair]) -> None:
        self.gm, self.router, self.sources = gm, router, sources
        self.pairs: dict[fx.Node, _Pair] = {}
        self.parts: dict[fx.Node, list[_Pair]] = {}  # of nodes with several results
        self.inside: set[fx.Node] = set()  # of a channel shuffle
        self.absorbers: dict[fx.Node, _Pair] = {}
        self.blocked: set[fx.Node] = set()

    def run(self) -> None:
        for node in self.gm.graph.nodes:
            pairs = [self.pairs[n] for n in node.all_input_nodes if n in self.pairs]
            pairs += [part for n in node.all_input_nodes for part in self.parts.get(n, ())]
            skip = reads_shape(node) or node in self.inside
            fixed = not self.router.pinned.isdisjoint(node.all_input_nodes)
            if pairs and not skip and (fixed or (not self._passes(node) and not self._ends(node))):
                self.blocked.update(*(pair.sources for pair in pairs))
            if node in self.sources:
                self.pairs[node] = self.sources[node]

    def _ends(self, node: fx.Node) -> bool:
        """Whether `node` can absorb the pair of its input."""
        if len(node.all_input_nodes) != 1 or (value := node.all_input_nodes[0]) not in self.pairs:
            return False
        pair = self.pairs[value]
        if pair.axis != 1:
            if not self._ends_channels_last(node, value, pair):
                return False
        elif pair.flat != (rank(value) == 2) or self.router.refusal(node, value, len(pair.scale)) is not None:
            return False
        self.absorbers[node] = pair
        return True

    def _ends_channels_last(self, node: fx.Node, value: fx.Node, pair: _Pair) -> bool:
        """Whether `node` is a linear layer over the last axis, with the channels there."""
        module, dims = called_module(self.gm, node), rank(value)
        return (
            type(module) is nn.Linear
            and dims == pair.axis + 1
            and module.in_features == len(pair.scale)
            and node.args == (value,)
            and self.router.fixed_weight(node) is None
        )

    def _passes(self, node: fx.Node) -> bool:
        """Whether the pairs of `node`'s inputs can be applied to its output instead, which then has one."""
        first = node.all_input_nodes[0]
        if first in self.parts:
            index = node.args[1] if node.target is operator.getitem else None
            if not isinstance(index, int):
                return False
            self.pairs[node] = self.parts[first][index]
            return True
        branches = concatenated(node)
        if branches is not None:
            pair = self._concatenate(branches)
        elif operator_name(node) == "add":
            pair = self._add(node)
        else:
            return self._passes_one(node, first)
        if pair is not None:
            self.pairs[node] = pair
        return pair is not None

    def _passes_one(self, node: fx.Node, value: fx.Node) -> bool:
        pair = self.pairs.get(value)
        if pair is None or any(n in self.pairs for n in node.all_input_nodes if n is not value):
            return False
        dims = rank(value)
        axes = None if dims is None or pair.flat else transposed(node, dims)
        if axes is not None:
            self.pairs[node] = dataclasses.replace(pair, axis=axes.index(pair.axis))
        elif pair.axis != 1:
            return self._passes_with_channels_elsewhere(node, pair)
        elif commutes(self.gm, node, value, through_padding=False):
            flattens = flattens_channels(self.gm, node) or rank(node) == 2
            self.pairs[node] = dataclasses.replace(pair, flat=pair.flat or flattens)
        elif pair.flat:
            return False
        elif resizes(self.gm, node, value) or joins_pixels(self.gm, node):
            self.pairs[node] = pair
        elif (shuffle := shuffled(self.gm, node)) is not None and len(pair.scale) % shuffle[1] == 0:
            last, groups = shuffle
            order = torch.arange(len(pair.scale), device=pair.scale.device).view(groups, -1).T.reshape(-1)
            self.pairs[last] = pair.take(order)
            self.inside |= {node, *chain_between(node, last)}
        elif (slices := pieces(node, len(pair.scale))) is not None:
            self.parts[node] = [pair.take(channels) for channels in slices]
        elif (taken := taken_channels(node)) is not None:
            self.pairs[node] = pair.take(taken)
        else:
            return False
        return True

    def _passes_with_channels_elsewhere(self, node: fx.Node, pair: _Pair) -> bool:
        if operator_of(self.gm, node) not in ("identity", "dropout", "contiguous"):
            return False
        self.pairs[node] = pair
        return True

    def _concatenate(self, branches: Sequence[fx.Node]) -> _Pair | None:
        candidates = [self._pair_of(branch) for branch in branches]
        pairs = [pair for pair in candidates if pair is not None]
        if len(pairs) < len(branches) or any(pair.flat or pair.axis != 1 for pair in pairs):
            return None
        return _Pair(
            torch.cat([pair.scale for pair in pairs]),
            torch.cat([pair.shift for pair in pairs]),
            frozenset().union(*(pair.sources for pair in pairs)),
        )

    def _pair_of(self, node: fx.Node) -> _Pair | None:
        """The pair of `node`, or the identity; None if its number of channels is unknown."""
        if node in self.pairs:
            return self.pairs[node]
        size = channels_of(self.gm, node)
        if size is None:
            return None
        like = next(iter(self.pairs.values())).scale
        return _Pair(like.new_ones(size), like.new_zeros(size), frozenset())

    def _add(self, node: fx.Node) -> _Pair | None:
        """(a r + v) + (b r + w) = (a + b) r + (v + w); a value without a pair has r = 1 and w = 0."""
        if len(node.args) != 2 or node.kwargs:
            return None
        operands = [n for n in node.args if isinstance(n, fx.Node)]
        pairs = [self.pairs[n] for n in operands if n in self.pairs]
        ranks = {rank(n) for n in operands}
        if len(ranks) > 1 or None in ranks or any(p.flat or p.axis != 1 or len(p.scale) == 1 for p in pairs):
            return None
        one = pairs[0]
        if len(pairs) == 1:
            return one if bool((one.scale == 1).all()) else None
        other = pairs[1]
        if not torch.equal(one.scale, other.scale):
            return None
        return _Pair(one.scale, one.shift + other.shift, one.sources | other.sources)
