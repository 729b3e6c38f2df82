"""The pass that finds activations which a model writes out by hand."""

from collections.abc import Iterator

from torch import fx, nn

from pn_compiler.activations import is_activation, known_by_values
from pn_compiler.aliases import find_aliases
from pn_compiler.batch_norms import is_batch_norm
from pn_compiler.graph_utils import add_module, call_module_after, called_module, has_hooks
from pn_compiler.pass_base import GraphPass, PassResult
from pn_compiler.passes.canonicalize_activations import CanonicalizeActivations
from pn_compiler.spelling import moves_values, operator_name, reads_shape

_ELEMENTWISE = frozenset(
    [
        "abs", "add", "clamp", "clamp_max", "clamp_min", "clip", "div", "erf", "exp", "expm1", "ge", "gt",
        "le", "log", "log1p", "lt", "max", "maximum", "min", "minimum", "mul", "multiply", "neg", "ones_like",
        "pow", "rsub", "sigmoid", "softplus", "sub", "tanh", "true_divide", "truediv", "where", "zeros_like",
    ]
)  # fmt: skip
_LONGEST = 12  # operators; the tanh form of GELU takes 8


class RecognizeActivations(GraphPass):
    """Turns an activation that is written out behind a BatchNorm into the module of torch.nn it equals.

    Given:   y = bn(x); y * torch.sigmoid(y)         Result:  y = bn(x); silu(y)
             y = bn(x); MySwish()(y)                          y = bn(x); silu(y)
    Leaves alone: expressions that equal no activation of the table, by their values from -30 to 30.
    Outputs: preserved to rounding.
    """

    preserves_outputs = True
    runs_after = (CanonicalizeActivations,)

    def run(self, graph: fx.GraphModule) -> PassResult:
        rewritten = 0
        behind: set[fx.Node] = set()
        pinned = find_aliases(graph).pinned
        for node in list(graph.graph.nodes):
            module = called_module(graph, node)
            moved = moves_values(node, module) and node.all_input_nodes[0] in behind
            if moved or (module is not None and is_batch_norm(module)):
                behind.add(node)
                rewritten += 0 if node in pinned else _rewrite(graph, node)
        return PassResult(rewritten)


def _rewrite(graph: fx.GraphModule, source: fx.Node) -> int:
    """Replaces what is computed of `source` alone, if it is an activation."""
    readers = [user for user in source.users if not reads_shape(user)]
    if len(readers) == 1:
        module = called_module(graph, readers[0])
        if module is not None:
            return _rewrite_leaf(graph, readers[0], module)
    for inside in _expressions(graph, source):
        result = inside[-1]
        activation = known_by_values(_as_module(graph, source, inside))
        if activation is not None:
            path = add_module(graph, result.name, activation.train(graph.training))
            call = call_module_after(graph, result, path, (source,))
            call.meta = dict(source.meta)
            result.replace_all_uses_with(call)
            for node in reversed(inside):
                graph.graph.erase_node(node)
            return 1
    return 0


def _rewrite_leaf(graph: fx.GraphModule, call: fx.Node, module: nn.Module) -> int:
    """Replaces a module without state that torch.fx did not enter, if it is an activation."""
    own = not type(module).__module__.startswith("torch.")
    stateless = next(module.parameters(), None) is None and next(module.buffers(), None) is None
    if not (own and stateless) or has_hooks(module) or len(call.args) != 1 or call.kwargs:
        return 0
    activation = known_by_values(module)
    if activation is None:
        return 0
    path = add_module(graph, call.name, activation.train(graph.training))
    call.target = path
    return 1


def _expressions(graph: fx.GraphModule, source: fx.Node) -> Iterator[list[fx.Node]]:
    """Sets of nodes that compute one value of `source` alone and that nothing else reads, smallest first."""
    inside: list[fx.Node] = []
    node = source.next
    while node.op != "root" and len(inside) < _LONGEST:
        inputs = node.all_input_nodes
        if inputs and all(i is source or i in inside for i in inputs) and _is_elementwise(graph, node):
            inside.append(node)
            needed = _ancestors(node, inside)
            others = {user for n in (source, *needed) for user in n.users if n is not node}
            if len(needed) > 1 and {user for user in others if not reads_shape(user)} <= set(needed):
                yield needed
        node = node.next


def _ancestors(node: fx.Node, inside: list[fx.Node]) -> list[fx.Node]:
    """Those of `inside` from which `node` is computed, itself included, in order."""
    needed = {node}
    for candidate in reversed(inside):
        if any(user in needed for user in candidate.users):
            needed.add(candidate)
    return [n for n in inside if n in needed]


def _is_elementwise(graph: fx.GraphModule, node: fx.Node) -> bool:
    module = called_module(graph, node)
    if module is not None:
        return is_activation(module) and next(module.parameters(), None) is None and not has_hooks(module)
    name = operator_name(node)
    if name not in _ELEMENTWISE:  # y.mul_(...) and y *= ... as well
        name = name.removesuffix("_").removeprefix("i")
    numbers = [a for a in (*node.args, *node.kwargs.values()) if not isinstance(a, fx.Node)]
    return name in _ELEMENTWISE and all(isinstance(n, int | float) for n in numbers)


def _as_module(graph: fx.GraphModule, source: fx.Node, inside: list[fx.Node]) -> fx.GraphModule:
    """What `inside` computes of `source`, as a module of one argument."""
    expression = fx.Graph()
    values = {source: expression.placeholder("x")}
    for node in inside:
        values[node] = expression.node_copy(node, lambda n: values[n])
    expression.output(values[inside[-1]])
    return fx.GraphModule(graph, expression)
