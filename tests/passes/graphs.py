"""What the tests of single passes share: a traced graph, a second run, a site computed by hand."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.graph.ranks import infer_ranks, record_pixels
from pn_compiler.graph.site_table import site_table
from pn_compiler.nn import ProxyNormAct
from pn_compiler.running.inputs import Inputs
from pn_compiler.tracing.trace_module import trace_module

BY_HAND = 1e-7  # relative error of moments that are sums over a grid


def traced(model: nn.Module, x: Tensor | None = None) -> fx.GraphModule:
    """A graph of a copy of `model`, with ranks, and with the shapes of a run on `x`."""
    gm, _, _ = trace_module(copy.deepcopy(model))
    inputs = None if x is None else Inputs((x,))
    if inputs is not None:
        record_pixels(gm, inputs)
    infer_ranks(gm, inputs)
    return gm


def readers(model: nn.Module) -> tuple[fx.GraphModule, fx.Node, Any]:
    """A graph that shares the layers of `model`, the value of its "bn", and the results."""
    gm, _, _ = trace_module(model)
    infer_ranks(gm)
    value = next(node for node in gm.graph.nodes if node.target == "bn")
    return gm, value, next(node for node in gm.graph.nodes if node.op == "output").args[0]


def run(graph_pass: GraphPass, gm: fx.GraphModule) -> PassResult:
    """The result of `graph_pass` on `gm`, in place. Asserts that a second run changes nothing."""
    result = graph_pass(gm)
    table = dict(site_table(gm))
    code, modules = gm.code, [(name, type(module)) for name, module in gm.named_modules()]
    state = {name: value.clone() for name, value in gm.state_dict().items()}
    assert graph_pass(gm).rewritten == 0
    assert gm.code == code
    assert site_table(gm) == table
    assert [(name, type(module)) for name, module in gm.named_modules()] == modules
    assert gm.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in gm.state_dict().items())
    return result


def untouched(graph_pass: GraphPass, gm: fx.GraphModule) -> PassResult:
    """The result of `graph_pass` on `gm`. Asserts that it left the graph and its modules as they were."""
    code, modules = gm.code, dict(gm.named_modules())
    result = graph_pass(gm)
    assert result.rewritten == 0
    assert gm.code == code
    assert dict(gm.named_modules()) == modules
    return result


def called(gm: fx.GraphModule) -> list[type[nn.Module]]:
    """The classes of the modules that `gm` calls, in order."""
    return [type(gm.get_submodule(str(n.target))) for n in gm.graph.nodes if n.op == "call_module"]


def randomize_proxies(model: nn.Module) -> None:
    """Gives every proxy distribution random parameters, as if they were trained."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "proxy" in name:
            nn.init.normal_(parameter, 0, 0.3)


def normalized_by_hand(x: Tensor, num_groups: int, eps: float) -> Tensor:
    """`x`, [N, C, *], less the mean of each group of channels, over its standard deviation."""
    grouped = x.double().reshape(len(x), num_groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    return (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)


def scale_and_shift_by_hand(
    site: ProxyNormAct, activation: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(r, v), [C] float64, from sums over a fine grid of the proxy distribution."""
    parameters = (site.weight, site.bias, site.proxy_weight, site.proxy_bias)
    weight, bias, proxy_weight, proxy_bias = (p.detach().double() for p in parameters)
    grid = torch.linspace(-9, 9, 100_001, dtype=torch.float64).view(-1, 1)  # [nodes, C] below
    density = torch.softmax(-grid.square() / 2, 0)
    values = activation(weight * (proxy_bias + (1 + proxy_weight) * grid) + bias)
    mean = (values * density).sum(0)
    var = ((values - mean).square() * density).sum(0)
    scale = (var + site.proxy_eps).rsqrt()
    return scale, -mean * scale


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values`, [C], so that they broadcast over `x`, [N, C, *]."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def activation_by_hand(x: Tensor, site: ProxyNormAct, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """What `site` hands to its activation, and through it, in float64."""
    y = normalized_by_hand(x, site.num_groups, site.eps)
    weight, bias = (p.detach().double() for p in (site.weight, site.bias))
    return activation(y * per_channel(weight, y) + per_channel(bias, y))


def site_by_hand(x: Tensor, site: ProxyNormAct, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """What `site` computes of `x`, in float64 and from its definition alone."""
    a = activation_by_hand(x, site, activation)
    scale, shift = scale_and_shift_by_hand(site, activation)
    return a * per_channel(scale, a) + per_channel(shift, a)


class SiteNet(nn.Module):
    """A site, and a function of its output and of layers that may absorb its scale and shift."""

    def __init__(self, function: Callable[[Any, Tensor], Any], activation: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.site = ProxyNormAct(1, 3, activation or nn.SiLU())
        nn.init.normal_(self.site.weight, 1, 0.3)
        nn.init.normal_(self.site.bias, 0, 0.3)
        randomize_proxies(self)
        self.conv, self.padded = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise, self.squeeze = nn.Conv2d(3, 6, 1, groups=3), nn.Conv2d(3, 3, 1)
        self.linear, self.flat = nn.Linear(3, 2), nn.Linear(3 * 16, 2)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.site(x))


def by_hand(model: SiteNet, x: Tensor) -> Any:
    """What `model` computes of `x` with its site from the definition alone."""
    return model.function(model, site_by_hand(x, model.site, copy.deepcopy(model.site.activation)))
