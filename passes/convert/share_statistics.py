"""The pass that computes the proxy statistics of all sites at once."""

import copy
import operator
from collections import defaultdict

from torch import fx

from pn_compiler.graph.graph_utils import add_module, module_calls
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.nn import ProxyNormAct, ProxyStatistics, SiteGroup
from pn_compiler.numerics.proxy_statistics import PARAMETERS
from pn_compiler.passes.convert.insert_proxy_norm import InsertProxyNorm
from pn_compiler.passes.route_affine import RouteAffine


class ShareStatistics(GraphPass):
    """Computes the proxy statistics of all sites together at the head of the graph.

    Given:   ProxyNormAct(x); ProxyNormAct(y)
    Result:  p, q = ProxyStatistics(weight, ..., proxy_bias); ProxyNormAct(x, p); ProxyNormAct(y, q)
    Leaves alone: sites whose activation has parameters, and those without others like them.
    Outputs: preserved to rounding, or to the accuracy of the quadrature (1e-9), whose nodes sites then share.
    Source: they depend only on parameters (docs/method.md). Each site runs dozens of operators on tensors
        of size [C]; between two convolutions they run with cold caches, at several times their cost.
    """

    runs_after = (RouteAffine,)
    requires = (InsertProxyNorm,)
    preserves_outputs = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        calls = module_calls(gm)
        alike: dict[object, dict[str, ProxyNormAct]] = defaultdict(dict)
        for path in calls:
            site = gm.get_submodule(path)
            if not isinstance(site, ProxyNormAct) or len(calls[path][0].args) > 1:
                continue
            if not list(site.activation.parameters()):
                alike[site.recipe, site.weight.device, site.weight.dtype][path] = site
        groups = [sites for sites in alike.values() if len(sites) > 1]
        if groups:
            _share(gm, groups, calls)
        return PassResult(sum(map(len, groups)))


def _share(
    gm: fx.GraphModule, groups: list[dict[str, ProxyNormAct]], calls: dict[str, list[fx.Node]]
) -> None:
    shared = ProxyStatistics([_group(list(sites.values())) for sites in groups])
    at = add_module(gm, "proxy_statistics", shared.train(gm.training))
    names = [f"{path}.{name}" for sites in groups for name in PARAMETERS for path in sites]
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    with gm.graph.inserting_before(first):
        parameters = tuple(gm.graph.get_attr(name) for name in names)
        node = gm.graph.call_module(at, parameters)
        for index, path in enumerate(path for sites in groups for path in sites):
            part = gm.graph.call_function(operator.getitem, (node, index))
            for call in calls[path]:
                call.args = (*call.args, part)


def _group(sites: list[ProxyNormAct]) -> SiteGroup:
    first, sizes = sites[0], tuple(site.num_channels for site in sites)
    return SiteGroup(first.recipe, copy.deepcopy(first.activation), sizes)
