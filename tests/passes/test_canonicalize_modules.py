"""Functional, ATen and fused layers become modules, under the names of their parameters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.graph.ranks import infer_ranks
from pn_compiler.passes.prepare.canonicalize_activations import CanonicalizeActivations
from pn_compiler.passes.prepare.canonicalize_modules import CanonicalizeModules
from pn_compiler.testing import assert_same_outputs, count_modules, randomize_batch_norms
from pn_compiler.tracing.trace_module import trace_module
from tests import zoo

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Functional(nn.Module):
    """Everything through torch.nn.functional, on parameters of ordinary modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4, eps=1e-3)
        self.conv2, self.fc = nn.Conv2d(4, 6, 1, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)
        bn = self.bn
        x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.1, 1e-3)
        x = F.relu(x)
        x = F.conv2d(x, self.conv2.weight)
        return F.linear(x.mean((2, 3)), self.fc.weight, self.fc.bias)


def test_functional_layers_become_modules_under_their_names() -> None:
    net = randomize_batch_norms(Functional()).eval()
    graph, _, _ = trace_module(copy.deepcopy(net))
    infer_ranks(graph)
    result = CanonicalizeModules()(graph)
    assert result.rewritten == 4
    assert count_modules(graph, nn.Conv2d, nn.BatchNorm2d, nn.Linear) == 4
    assert_same_outputs(graph(IMAGES), net(IMAGES))
    assert set(graph.state_dict()) == set(net.state_dict())
    assert CanonicalizeModules()(graph).rewritten == 0
    (site,) = pn_compiler.sites(pn_compiler.transform(net))
    assert (site.name, site.kind) == ("bn", "pn")


def test_leaves_alone_what_several_owners_share() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.other.weight, self.bn.bias)

    net = randomize_batch_norms(Mixed()).eval()
    converted = pn_compiler.transform(net)
    assert_same_outputs(converted(IMAGES), net(IMAGES))
    assert "PN106" in {site.code for site in pn_compiler.sites(converted)}


def test_exported_programs_become_modules() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 2, 1))
    net = randomize_batch_norms(net).eval()
    program = torch.export.export(net, (IMAGES,)).module(check_guards=False)
    converted = pn_compiler.transform(program)
    (site,) = pn_compiler.sites(converted)
    assert (site.name, site.kind, site.activation) == ("1", "pn", "relu6")
    assert_same_outputs(converted(IMAGES), pn_compiler.transform(net)(IMAGES))
    assert set(converted.state_dict()) == set(pn_compiler.transform(net).state_dict())


def test_fused_norm_and_activation_of_timm() -> None:
    norm_act = zoo.timm().layers.BatchNormAct2d
    shared = norm_act(4, act_layer=nn.SiLU)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), shared, nn.Conv2d(4, 4, 1), shared, nn.Conv2d(4, 4, 1),
        norm_act(4, apply_act=False),
    )  # fmt: skip
    net = randomize_batch_norms(net).eval()
    graph, _, _ = trace_module(copy.deepcopy(net))
    CanonicalizeModules()(graph)
    assert count_modules(graph, norm_act) == 0
    assert_same_outputs(graph(IMAGES), net(IMAGES))
    converted = pn_compiler.transform(net)
    assert [(s.kind, s.activation) for s in pn_compiler.sites(converted)] == [
        ("pn", "silu"),
        ("norm_only", None),
    ]


class NormAct(nn.BatchNorm2d):
    """A BatchNorm of the user's own that holds what follows it."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.1), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("activation", [nn.LeakyReLU(), nn.ReLU(), nn.PReLU(4)])
def test_a_norm_that_holds_its_activation(activation: nn.Module) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), NormAct(4, activation), nn.Conv2d(4, 4, 1), NormAct(4, activation)
    )
    net = randomize_batch_norms(net).double().eval()
    converted = pn_compiler.transform(net, IMAGES.double(), strict=True)
    assert [(s.name, s.kind, s.activation is None) for s in pn_compiler.sites(converted)] == [
        ("1", "pn", False),
        ("3", "norm_only", False),
    ]
    by_hand = copy.deepcopy(net)
    plain = pn_compiler.transform(net, IMAGES.double(), proxy=False)
    for name in ("1", "3"):
        by_hand[int(name)] = nn.Sequential(plain.get_submodule(name), net[int(name)].drop, activation)
    assert_same_outputs(converted(IMAGES.double()), by_hand(IMAGES.double()), tolerance=1e-9)
    assert_same_outputs(pn_compiler.fold(converted)(IMAGES.double()), converted(IMAGES.double()))


def test_identities_go_and_in_place_results_are_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.identity = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.identity(x) + 1
            z = y.relu_()
            return y * 2 + z

    gm, _, _ = trace_module(Net())
    assert CanonicalizeActivations()(gm).rewritten > 0
    assert count_modules(gm, nn.ReLU) == 1
    assert not any(node.op == "call_method" for node in gm.graph.nodes)
    x = torch.randn(4)
    assert torch.equal(gm(x), Net()(x))


@pytest.mark.parametrize("layer", ["conv", "bn"])
def test_a_function_on_the_weights_of_a_module_calls_no_hooks_of_it(layer: str) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(self.bn(self.conv(x)), self.conv.weight, self.conv.bias)
            bn = self.bn
            return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training)

    net = randomize_batch_norms(Both()).eval()
    net.get_submodule(layer).register_forward_hook(lambda module, args, output: output + 1)
    graph, _, _ = trace_module(copy.deepcopy(net))
    infer_ranks(graph)
    assert CanonicalizeModules()(graph).rewritten == 1  # of the other layer
    assert_same_outputs(graph(IMAGES), net(IMAGES))
