"""Reads the outputs of a ProxyNormAct in a graph."""

import operator
from collections.abc import Iterable

from torch import fx

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.graph.graph_utils import called_module
from pn_compiler.nn import Output, ProxyNormAct


def site_outputs(gm: fx.GraphModule, call: fx.Node) -> dict[Output, list[fx.Node]]:
    """The nodes that read each output of a ProxyNormAct call."""
    module = called_module(gm, call)
    assert isinstance(module, ProxyNormAct)
    if len(module.outputs) == 1:
        return {module.outputs[0]: [call]}
    reads: dict[Output, list[fx.Node]] = {name: [] for name in module.outputs}
    for user in call.users:
        if user.target is operator.getitem and isinstance(user.args[1], int):
            reads[module.outputs[user.args[1]]].append(user)
    return reads


def read_outputs(gm: fx.GraphModule, call: fx.Node) -> dict[Output, fx.Node]:
    """One new node for each output of a ProxyNormAct call; the call itself if it has only one."""
    module = called_module(gm, call)
    assert isinstance(module, ProxyNormAct)
    if len(module.outputs) == 1:
        return {module.outputs[0]: call}
    nodes: dict[Output, fx.Node] = {}
    with gm.graph.inserting_after(call):
        for index, name in reversed(list(enumerate(module.outputs))):
            nodes[name] = gm.graph.call_function(operator.getitem, (call, index))
    for name in ("output", "activation", "affine"):
        if name in nodes:
            nodes[name].meta = dict(call.meta)
    return nodes


def where_it_went(site: str, how: str, places: Iterable[fx.Node]) -> Diagnostic:
    """The diagnostic that scale and shift of `site` went `how` ("into", "before") the calls `places`."""
    names = list(dict.fromkeys(str(p.target if p.op == "call_module" else p.name) for p in places))
    more = f" and {len(names) - 2} more" if len(names) > 3 else ""
    return Diagnostic("PN210", site, f"{how} {', '.join(names[: 2 if more else 3])}{more}".strip())


def chain_between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes of the chain from after `first` to `last`, last one first."""
    nodes = []
    while last is not first:
        nodes.append(last)
        last = last.all_input_nodes[0]
    return nodes
