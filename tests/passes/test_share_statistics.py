"""ShareStatistics and its inverse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pn_compiler
from pn_compiler.nn import ProxyNormAct, ProxyStatistics
from pn_compiler.passes.convert.share_statistics import ShareStatistics
from pn_compiler.passes.fold.unshare_statistics import UnshareStatistics
from pn_compiler.testing import assert_same_outputs, count_modules, randomize_batch_norms
from tests import zoo
from tests.passes.graphs import BY_HAND, called, randomize_proxies, run, site_by_hand, traced, untouched


def network(*activations: nn.Module) -> nn.Module:
    layers: list[nn.Module] = []
    for width, activation in enumerate(activations, start=4):
        layers += [nn.Conv2d(width - 1, width, 3, padding=1), nn.BatchNorm2d(width), activation]
    layers += [nn.Conv2d(len(activations) + 3, 2, 1)]
    return randomize_batch_norms(nn.Sequential(*layers)).double().eval()


X = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def converted(*activations: nn.Module) -> fx.GraphModule:
    """Converted, with proxy parameters as after some training."""
    graph = pn_compiler.transform(network(*activations))
    assert isinstance(graph, fx.GraphModule)
    torch.manual_seed(1)
    for name, parameter in graph.named_parameters():
        if "proxy" in name:
            nn.init.normal_(parameter, 0, 0.3)
    return graph


def unshared(gm: fx.GraphModule) -> int:
    return UnshareStatistics()(gm).rewritten


QUADRATURE = 1e-6  # that of `proxy_moments`: alone, a site with SiLU takes other nodes


def gradients(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    gm.zero_grad()
    gm(X).square().sum().backward()
    return {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("activations", "shared"),
    [
        ((nn.ReLU(), nn.ReLU(), nn.ReLU()), 3),
        ((nn.ReLU(), nn.SiLU(), nn.ReLU(), nn.SiLU()), 4),
        ((nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)), 0),  # not the same function
        ((nn.ReLU(), nn.SiLU()), 0),  # none has a like
        ((nn.PReLU(), nn.PReLU(), nn.ReLU(), nn.ReLU()), 2),  # PReLU learns
    ],
    ids=str,
)
def test_shared_and_alone_compute_the_same(activations: tuple[nn.Module, ...], shared: int) -> None:
    graph = converted(*activations)
    assert count_modules(graph, ProxyStatistics) == (shared > 0)
    together, with_gradients = graph(X), gradients(graph)
    with torch.no_grad():
        assert_same_outputs(graph(X), together)
    names = list(graph.state_dict())
    assert unshared(graph) == shared
    assert_same_outputs(graph(X), together, tolerance=QUADRATURE)
    alone = gradients(graph)
    assert alone.keys() == with_gradients.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(gradient, with_gradients[name], rtol=QUADRATURE, atol=QUADRATURE)
    assert list(graph.state_dict()) == names
    assert unshared(graph) == 0
    assert ShareStatistics()(graph).rewritten == shared
    assert ShareStatistics()(graph).rewritten == 0
    assert_same_outputs(graph(X), together)


@torch.no_grad()
def test_shared_statistics_are_those_of_each_site_by_hand() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.SiLU(), nn.BatchNorm2d(3), nn.SiLU()).double().eval()
    gm = pn_compiler.transform(randomize_batch_norms(net), warm_start="none")
    assert isinstance(gm, fx.GraphModule)
    randomize_proxies(gm)
    unshared(gm)
    assert run(ShareStatistics(), gm).rewritten == 2
    assert called(gm) == [ProxyStatistics, ProxyNormAct, ProxyNormAct]
    y = X
    for name in ("0", "2"):
        site = gm.get_submodule(name)
        assert isinstance(site, ProxyNormAct)
        y = site_by_hand(y, site, nn.SiLU())
    assert_same_outputs(gm(X), y, tolerance=BY_HAND)


class Unlike(nn.Module):
    """Two sites with equal activations, of which one `change`s."""

    def __init__(self, change: Callable[[ProxyNormAct], Any]) -> None:
        super().__init__()
        self.one, self.two = ProxyNormAct(1, 3, nn.ReLU()), ProxyNormAct(1, 3, nn.ReLU())
        change(self.two)

    def forward(self, x: torch.Tensor) -> Any:
        return self.two(self.one(x))


UNLIKE: dict[str, Callable[[ProxyNormAct], Any]] = {
    "dtype": lambda site: site.half(),
    "device": lambda site: site.to("meta"),
    "proxy_eps": lambda site: setattr(site, "proxy_eps", 0.1),
    "its affine is read": lambda site: setattr(site, "outputs", ("output", "affine")),
    "options": lambda site: setattr(site, "activation", nn.Hardtanh(0.0, 1.0)),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_sites_that_differ_share_nothing(name: str) -> None:
    untouched(ShareStatistics(), traced(Unlike(UNLIKE[name])))
    assert run(ShareStatistics(), traced(Unlike(lambda site: None))).rewritten == 2


def test_switched_off_the_sites_compute_for_themselves() -> None:
    graph = converted(nn.ReLU(), nn.ReLU())
    (statistics,) = (m for m in graph.modules() if isinstance(m, ProxyStatistics))
    with torch.no_grad():
        before = graph(X)
        statistics.enabled = False
        assert_same_outputs(graph(X), before)


def test_a_site_called_twice_is_computed_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.bn, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.relu = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.relu(self.bn(self.first(x)))
            x = self.relu(self.bn(self.second(x)))
            return self.relu(self.other(x))

    gm = pn_compiler.transform(Twice(), warm_start="none")
    assert isinstance(gm, fx.GraphModule)
    sites = [n for n in gm.graph.nodes if n.op == "call_module" and n.target in ("bn", "other")]
    assert len({node.args[1] for node in sites}) == 2
    assert len(sites) == 3


def test_parameters_are_read_when_it_runs() -> None:
    graph = converted(nn.ReLU(), nn.ReLU())
    site = next(m for m in graph.modules() if isinstance(m, ProxyNormAct))
    with torch.no_grad():
        before = graph(X)
        site.proxy_bias.data += 1
        after = graph(X)
        assert (after - before).abs().max() > 1e-3
        unshared(graph)
        assert_same_outputs(graph(X), after)


def test_offloaded_parameters_are_left_to_the_sites() -> None:
    """As accelerate does it: a module's parameters are on the meta device, but while it runs."""
    graph = converted(nn.ReLU(), nn.ReLU(), nn.SiLU(), nn.SiLU())
    with torch.no_grad():
        before = graph(X)
        for module in graph.modules():
            values = dict(module._parameters)
            if not values or isinstance(module, ProxyStatistics):
                continue

            def bring(module: nn.Module, _: Any, values: dict[str, Any] = values) -> None:
                module._parameters.update(values)

            def take(module: nn.Module, _: Any, out: Any) -> None:
                for name, value in module._parameters.items():
                    if value is not None:
                        module._parameters[name] = nn.Parameter(value.to("meta"))

            module.register_forward_pre_hook(bring)
            module.register_forward_hook(take)
            take(module, None, None)
        assert_same_outputs(graph(X), before, tolerance=QUADRATURE)


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "resnet50"])
def test_a_site_costs_few_operators(name: str) -> None:
    """What benchmarks.train_step measures, without a clock: it was 150 to 260 in a step, 25 in evaluation."""
    x, counts = torch.randn(2, 3, 32, 32), []
    for proxy in (False, True):
        torch.manual_seed(0)
        model = zoo.torchvision().models.get_model(name, weights=None)
        graph = pn_compiler.transform(model, warm_start="none", proxy=proxy, num_groups=1).train()
        with Operators() as step:
            graph(x).square().mean().backward()
        graph.eval()
        with torch.no_grad():
            graph(x)
            with Operators() as evaluation:
                graph(x)
        counts.append((step.count, evaluation.count))
    sites = count_modules(graph, ProxyNormAct)
    in_step, in_evaluation = ((after - before) / sites for before, after in zip(*counts, strict=True))
    assert in_step < 45  # 20 to 40, most of them in the consumers
    assert in_evaluation < 8
