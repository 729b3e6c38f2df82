"""The pass that moves the computation of proxy statistics back into the sites."""

from torch import fx

from pn_compiler.graph.graph_utils import called_module, module_calls
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.nn import ProxyNormAct, ProxyStatistics


class UnshareStatistics(GraphPass):
    """Undoes ShareStatistics, so that each site computes its own statistics before it is folded.

    Given:   p, q = ProxyStatistics(weight, ..., proxy_bias); ProxyNormAct(x, p); ProxyNormAct(y, q)
    Result:  ProxyNormAct(x); ProxyNormAct(y)
    Outputs: preserved to rounding.
    """

    preserves_outputs = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        rewritten = 0
        for calls in module_calls(gm).values():
            for call in calls:
                if isinstance(called_module(gm, call), ProxyNormAct) and len(call.args) == 2:
                    call.args = call.args[:1]
                    rewritten += 1
        shared = [node for node in gm.graph.nodes if isinstance(called_module(gm, node), ProxyStatistics)]
        for node in shared:
            for dead in (*node.users, node, *node.args):
                gm.graph.erase_node(dead)
        return PassResult(rewritten)
