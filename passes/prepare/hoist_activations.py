"""The pass that moves an activation next to the BatchNorm that it follows."""

from torch import fx, nn

from pn_compiler.graph.aliases import Aliases, find_aliases, writes
from pn_compiler.graph.graph_utils import call_module_after, called_module, moves_values, traits_of
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.inspection.batch_norms import is_batch_norm
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.operators.activations import is_activation, is_homogeneous
from pn_compiler.operators.op_names import reads_shape
from pn_compiler.passes.prepare.recognize_activations import RecognizeActivations


class HoistActivations(GraphPass):
    """Moves an activation before the views and dropouts between it and a BatchNorm.

    Given:   act(flatten(bn(x)))                     Result:  flatten(act(bn(x)))
             y = bn(x); conv(act(y)); y.shape                 y = bn(x); conv(act(y)); x.shape
    Leaves alone: chains with other readers in between; a dropout before an activation that is not
        homogeneous, since relu(k y) = k relu(y) for the k of a dropout, but not for silu; an in-place
        dropout; a slope per channel (PReLU) behind a view.
    Outputs: preserved exactly.
    """

    preserves_outputs = True
    runs_after = (RecognizeActivations,)

    def run(self, gm: fx.GraphModule) -> PassResult:
        rewritten = 0
        aliases = find_aliases(gm)  # shape readers move, and activations of what is not pinned
        for node in list(gm.graph.nodes):
            module = called_module(gm, node)
            if module is None:
                continue
            if is_batch_norm(module) and node.args:
                rewritten += _read_shape_of_input(node, aliases)
            elif is_activation(module) and not has_hooks(module):
                rewritten += _hoist(gm, node, module, aliases)
        return PassResult(rewritten)


def _read_shape_of_input(norm: fx.Node, aliases: Aliases) -> int:
    """Makes readers of the shape of a BatchNorm's output read that of its input, which is the same.

    Not if the input is overwritten: ``squeeze_`` and the like change its shape later.
    """
    if norm.all_input_nodes[0] in aliases.overwritten:
        return 0
    readers = [user for user in norm.users if reads_shape(user)]
    for user in readers:
        user.replace_input_with(norm, norm.all_input_nodes[0])
    return len(readers)


def _hoist(gm: fx.GraphModule, activation: fx.Node, module: nn.Module, aliases: Aliases) -> int:
    source, chain = activation.all_input_nodes[0], []
    while _passes(gm, source, module) and _read_once(source):
        chain.append(source)
        source = source.all_input_nodes[0]
    norm = called_module(gm, source)
    if not chain or norm is None or not is_batch_norm(norm) or not _read_once(source):
        return 0
    if source in aliases.pinned:
        return 0
    moved = call_module_after(gm, source, str(activation.target), (source,))
    chain[-1].replace_input_with(source, moved)
    activation.replace_all_uses_with(chain[0])
    gm.graph.erase_node(activation)
    return 1


def _passes(gm: fx.GraphModule, node: fx.Node, activation: nn.Module) -> bool:
    """Whether `activation` can be applied before `node` instead of after it."""
    module = called_module(gm, node)
    if module is not None and has_hooks(module):
        return False
    if moves_values(gm, node):
        return all(parameter.numel() == 1 for parameter in activation.parameters())
    in_place = bool(writes(gm, node))  # over the output of the activation, which its gradient needs
    return traits_of(gm, node).drops and not in_place and is_homogeneous(activation)


def _read_once(node: fx.Node) -> bool:
    return sum(not reads_shape(user) for user in node.users) == 1
