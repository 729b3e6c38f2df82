"""The pass that turns every spelling of an activation into a module without side effects."""

import operator
from collections.abc import Collection

from torch import fx, nn

from pn_compiler.graph.aliases import find_aliases, in_place_operator, name_options, returns_target, writes
from pn_compiler.graph.dtypes import is_floating
from pn_compiler.graph.graph_utils import add_module, call_module_after, called_module, operator_of
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.graph.ranks import dtype
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.operators.activations import activation_of, reading_input
from pn_compiler.operators.op_names import operator_name


class CanonicalizeActivations(GraphPass):
    """Turns activation functions and methods into modules, and in-place effects into edges.

    Given:   y = bn(x); F.relu_(y); z = y + w         Result:  y = bn(x); r = relu(y); z = r + w
             y += w; y.size(0)                                 z = y + w; z.size(0)
             nn.Identity()(x)                                  x
    Leaves alone: functions that are not activations, or whose bounds are computed in the graph; those on
        integers and booleans, and clamps on what may be; writes observed through a view, by the caller or
        by untraced code; y += w with different dtypes.
    Outputs: preserved exactly.
    """

    preserves_outputs = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        rewritten = 0
        for node in list(gm.graph.nodes):
            module = called_module(gm, node)
            identity = module is not None and operator_of(gm, node) == "identity" and not has_hooks(module)
            if identity and node.args:
                node.replace_all_uses_with(node.all_input_nodes[0])
                gm.graph.erase_node(node)
                rewritten += 1
                continue
            name_options(node)
            rewritten += _redirect_later_users(gm, node)
        pinned = find_aliases(gm).pinned
        calls = [node for node in gm.graph.nodes if node.op in ("call_function", "call_method")]
        free = [node for node in calls if pinned.isdisjoint(writes(gm, node))]
        rewritten += sum(map(_without_writing, free))
        not_kept = find_aliases(gm).not_kept
        return PassResult(rewritten + sum(_rewrite(gm, node, not_kept) for node in free))


def _redirect_later_users(gm: fx.GraphModule, node: fx.Node) -> int:
    """Lets later readers of a tensor that `node` overwrites and returns read its result, the same tensor."""
    target = returns_target(gm, node)
    later = [] if target is None else [user for user in target.users if user > node]
    for user in later:
        user.replace_input_with(target, node)  # type: ignore[arg-type]  # no users of None
    return len(later)


def _rewrite(gm: fx.GraphModule, node: fx.Node, not_kept: Collection[fx.Node]) -> int:
    module = activation_of(node)
    if module is not None and node in not_kept and "relu" not in operator_name(node):
        module = reading_input(module)  # as clamp does; a relu cannot be trained there in any case
    if module is None or not _takes(gm, node.all_input_nodes[0], module):
        return 0
    path = add_module(gm, node.name, module.train(gm.training))
    call = call_module_after(gm, node, path, (node.all_input_nodes[0],))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)
    return 1


def _takes(gm: fx.GraphModule, value: fx.Node, module: nn.Module) -> bool:
    """Whether `module` computes on `value` what the function does: Hardtanh's bounds are not integers."""
    floating = is_floating(gm, value)
    return not isinstance(module, nn.Hardtanh) if floating is None else floating


def _without_writing(node: fx.Node) -> int:
    """Rewrites ``y += w`` to y + w if nothing else observes it: other passes only know that form."""
    name = in_place_operator(node)
    if name is None or len(node.args) != 2 or len({dtype(source) for source in node.all_input_nodes}) > 1:
        return 0  # in place the dtype is that of y
    node.op, node.target = "call_function", getattr(operator, _PLAIN.get(name, name))
    return 1


_PLAIN = {"and": "and_", "or": "or_"}
