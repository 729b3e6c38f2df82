"""The pass that turns every spelling of an activation into a module without side effect."""

from torch import fx, nn

from pn_compiler.activations import activation_of, is_activation
from pn_compiler.graph_utils import add_module, call_module_after, called_module, has_hooks
from pn_compiler.pass_base import GraphPass, PassResult
from pn_compiler.spelling import may_alias, overwritten


class CanonicalizeActivations(GraphPass):
    """Turns activation functions and methods into modules, and in-place effects into edges.

    Given:   y = bn(x); F.relu_(y); z = y + w         Result:  y = bn(x); r = relu(y); z = r + w
             nn.Identity()(x)                                  x
    Leaves alone: functions that are no activation, or whose bounds are computed in the graph; in-place
        effects on tensors that share memory with others.
    Outputs: preserved exactly.
    """

    preserves_outputs = True

    def run(self, graph: fx.GraphModule) -> PassResult:
        rewritten = 0
        for node in list(graph.graph.nodes):
            module = called_module(graph, node)
            if module is None:
                rewritten += _rewrite(graph, node)
            elif isinstance(module, nn.Identity) and node.args and not has_hooks(module):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.graph.erase_node(node)
                rewritten += 1
            elif is_activation(module) and getattr(module, "inplace", False):
                rewritten += _redirect_later_users(node, node.args[0])
        return PassResult(rewritten)


def _rewrite(graph: fx.GraphModule, node: fx.Node) -> int:
    target = overwritten(node)
    if target is not None and may_alias(target, node):
        return 0  # what else sees the effect cannot be told
    rewritten = 0 if target is None else _redirect_later_users(node, target)
    module = activation_of(node)
    if module is None:
        return rewritten
    path = add_module(graph, node.name, module.train(graph.training))
    call = call_module_after(graph, node, path, (node.all_input_nodes[0],))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)
    return rewritten + 1


def _redirect_later_users(node: fx.Node, source: object) -> int:
    """What reads `source` after `node` has overwritten it, reads what `node` left there."""
    if not isinstance(source, fx.Node) or may_alias(source, node):
        return 0
    later = [user for user in source.users if user > node]
    for user in later:
        user.replace_input_with(source, node)
    return len(later)
