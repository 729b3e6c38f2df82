"""The pass that turns every spelling of an activation into a module without side effect."""

from torch import fx, nn

from pn_compiler.activations import activation_of, is_activation
from pn_compiler.graph_utils import add_module, call_module_after, called_module
from pn_compiler.pass_base import GraphPass, PassResult
from pn_compiler.spelling import is_inplace


class CanonicalizeActivations(GraphPass):
    """Turns activation functions and methods into modules, and in-place effects into edges.

    Given:   y = bn(x); F.relu_(y); z = y + w         Result:  y = bn(x); r = relu(y); z = r + w
             nn.Identity()(x)                                  x
    Leaves alone: functions that are no activation, or whose bounds are computed in the graph.
    Outputs: preserved exactly.
    """

    preserves_outputs = True

    def run(self, graph: fx.GraphModule) -> PassResult:
        rewritten = 0
        for node in list(graph.graph.nodes):
            module = called_module(graph, node)
            if isinstance(module, nn.Identity) and len(node.all_input_nodes) == 1:
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.graph.erase_node(node)
                rewritten += 1
            elif module is not None:
                if is_activation(module) and getattr(module, "inplace", False):
                    rewritten += _redirect_later_users(node)
            else:
                rewritten += _rewrite(graph, node)
        return PassResult(rewritten)


def _rewrite(graph: fx.GraphModule, node: fx.Node) -> int:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return 0
    rewritten = 0
    if is_inplace(node):
        rewritten += _redirect_later_users(node)
    module = activation_of(node)
    if module is not None:
        module.train(graph.training)
        path = add_module(graph, node.name, module)
        call = call_module_after(graph, node, path, (node.args[0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
        rewritten += 1
    return rewritten


def _redirect_later_users(node: fx.Node) -> int:
    """What reads the input of an in-place `node` after it, reads what `node` left there."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return 0
    later = [user for user in source.users if user > node]
    for user in later:
        user.replace_input_with(source, node)
    return len(later)
