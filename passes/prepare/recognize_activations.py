"""The pass that recognises activations written out by hand."""

from collections.abc import Collection, Iterator

import torch
from torch import fx, nn

from pn_compiler.graph.aliases import find_aliases
from pn_compiler.graph.graph_utils import add_module, call_module_after, called_module, moves_values
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.inspection.batch_norms import is_batch_norm
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.operators.activations import is_activation, reading_input
from pn_compiler.operators.known_activations import known_by_values, known_module, known_piecewise
from pn_compiler.operators.op_names import reads_shape
from pn_compiler.operators.piecewise import Piecewise, identity
from pn_compiler.passes.prepare.canonicalize_activations import CanonicalizeActivations
from pn_compiler.passes.prepare.elementwise import Value, constant_of, value_of

_KEEPING_OUTPUT = (nn.Sigmoid, nn.Tanh)  # they keep their output for the gradient, in every spelling
_LONGEST = 16  # operators; the tanh form of GELU takes 8


class RecognizeActivations(GraphPass):
    """Turns an activation written out behind a BatchNorm into the torch.nn module that it equals.

    Given:   y = bn(x); y * torch.sigmoid(y)         Result:  y = bn(x); silu(y)
             y = bn(x); MySwish()(y)                          y = bn(x); silu(y)
             y = bn(x); y.clamp_min(0).clamp_max(40)          y = bn(x); hardtanh(y, 0, 40)
    Clamps, comparisons, sums and products are composed exactly; others are compared by values up to 1e6.
    Leaves alone: expressions that equal no activation in the table on the whole real line.
    Outputs: preserved to rounding.
    """

    preserves_outputs = True
    requires = (CanonicalizeActivations,)

    def run(self, gm: fx.GraphModule) -> PassResult:
        rewritten = 0
        behind: set[fx.Node] = set()
        aliases = find_aliases(gm)
        for node in list(gm.graph.nodes):
            module = called_module(gm, node)
            moved = moves_values(gm, node) and node.all_input_nodes[0] in behind
            if moved or (module is not None and is_batch_norm(module)):
                behind.add(node)
                rewritten += 0 if node in aliases.pinned else _rewrite(gm, node, aliases.not_kept)
        return PassResult(rewritten)


def _rewrite(gm: fx.GraphModule, source: fx.Node, not_kept: Collection[fx.Node]) -> int:
    """Replaces an expression that depends only on `source`, if it is an activation."""
    readers = [user for user in source.users if not reads_shape(user)]
    if len(readers) == 1:
        module = called_module(gm, readers[0])
        if module is not None and not is_activation(module):
            return _rewrite_leaf(gm, readers[0], module, not_kept)
    known = [
        (inside, act)
        for inside, value in _expressions(gm, source)
        for act in [_activation(gm, source, inside, value)]
        if act is not None
    ]
    if not known:
        return 0
    inside, activation = known[-1]
    result = inside[-1]
    activation = reading_input(activation) if result in not_kept else activation
    path = add_module(gm, result.name, activation.train(gm.training))
    call = call_module_after(gm, result, path, (source,))
    call.meta = dict(source.meta)
    result.replace_all_uses_with(call)
    _protect(gm, call, activation, needed=result in not_kept)
    for node in reversed(inside):
        gm.graph.erase_node(node)
    return 1


def _protect(gm: fx.GraphModule, call: fx.Node, activation: nn.Module, *, needed: bool) -> None:
    """Gives the readers of `call` a copy, if they may overwrite what `activation` keeps for its gradient."""
    if not needed or not isinstance(activation, _KEEPING_OUTPUT):
        return
    with gm.graph.inserting_after(call):
        copied = gm.graph.call_function(torch.clone, (call,))
    copied.meta = dict(call.meta)
    call.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)


def _activation(gm: fx.GraphModule, source: fx.Node, inside: list[fx.Node], value: Value) -> nn.Module | None:
    """The activation that the last node of `inside` computes, if it is one on the whole real line."""
    function = _as_module(gm, source, inside)
    if isinstance(value, Piecewise):
        activation = known_piecewise(value)
    else:
        activation = known_by_values(function)
        switches = {0.0, float(activation.threshold)} if isinstance(activation, nn.Softplus) else {0.0}
        if not value.edges <= switches:
            return None  # it bends elsewhere, however little
    dtypes = {p.dtype for p in gm.parameters() if p.is_floating_point()}
    return activation if activation is not None and all(_keeps(function, dtype) for dtype in dtypes) else None


@torch.no_grad()
def _keeps(function: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `function` preserves the dtype: y * (y > 0).float() turns float16 into float32."""
    try:
        return bool(function(torch.ones(1, dtype=dtype)).dtype == dtype)
    except RuntimeError:  # constants on another device
        return False


def _rewrite_leaf(gm: fx.GraphModule, call: fx.Node, module: nn.Module, not_kept: Collection[fx.Node]) -> int:
    """Replaces a stateless module that was not traced into, if it is an activation."""
    own = not type(module).__module__.startswith("torch.")
    stateless = next(module.parameters(), None) is None and next(module.buffers(), None) is None
    if not (own and stateless) or has_hooks(module) or len(call.args) != 1 or call.kwargs:
        return 0
    activation = known_module(module)
    if activation is None:
        return 0
    activation = reading_input(activation) if call in not_kept else activation
    call.target = add_module(gm, call.name, activation.train(gm.training))
    _protect(gm, call, activation, needed=call in not_kept)
    return 1


def _expressions(gm: fx.GraphModule, source: fx.Node) -> Iterator[tuple[list[fx.Node], Value]]:
    """Sets of nodes that compute one value from only `source` and have no other readers, smallest first.

    Each comes with the function that its last node computes.
    """
    values: dict[fx.Node, Value] = {source: identity()}
    inside: list[fx.Node] = []
    node = source.next
    while node.op != "root" and len(inside) < _LONGEST:
        value = _next_value(gm, node, values)
        if value is not None:
            values[node] = value
            inside.append(node)
            needed = _ancestors(node, inside)
            others = {user for n in (source, *needed) for user in n.users if n is not node}
            written = len(needed) > 1 or called_module(gm, node) is None
            if written and {user for user in others if not reads_shape(user)} <= set(needed):
                yield needed, value
        node = node.next


def _next_value(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    """The function that `node` computes of `values`, and of constants that it may also read."""
    inputs = node.all_input_nodes
    if not any(i in values for i in inputs):
        return None
    constants = {i: v for i in inputs for v in [constant_of(gm, i)] if v is not None}
    return value_of(gm, node, {**values, **constants})


def _ancestors(node: fx.Node, inside: list[fx.Node]) -> list[fx.Node]:
    """The nodes of `inside` that `node` is computed from, including itself, in order."""
    needed = {node}
    for candidate in reversed(inside):
        if any(user in needed for user in candidate.users):
            needed.add(candidate)
    return [n for n in inside if n in needed]


def _as_module(gm: fx.GraphModule, source: fx.Node, inside: list[fx.Node]) -> fx.GraphModule:
    """The expression `inside` of `source`, as a module of one argument."""
    expression = fx.Graph()
    values = {source: expression.placeholder("x")}

    def copied(n: fx.Node) -> fx.Node:
        return values[n] if n in values else expression.node_copy(n)  # else a constant

    for node in inside:
        values[node] = expression.node_copy(node, copied)
    expression.output(values[inside[-1]])
    return fx.GraphModule(gm, expression)
