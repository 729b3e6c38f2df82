"""Normalizer + activation become a site: what it computes, and why some stay without proxy normalization."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.base.config import TransformConfig, WarmStart
from pn_compiler.graph.pass_base import run_pipeline
from pn_compiler.graph.site_table import site_table
from pn_compiler.nn import ProxyNormAct
from pn_compiler.passes import preparation_pipeline
from pn_compiler.passes.convert.insert_proxy_norm import InsertProxyNorm
from pn_compiler.passes.convert.replace_batch_norm import ReplaceBatchNorm
from pn_compiler.testing import assert_same_outputs, count_modules, randomize_batch_norms
from tests.passes.graphs import called, run, site_by_hand, traced, untouched

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
X = IMAGES.double()
WARM, SCRATCH = TransformConfig(norm="layer"), TransformConfig(norm="layer", warm_start="none")


def normalized(model: nn.Module, config: TransformConfig) -> fx.GraphModule:
    """`model` in float64, as the passes before InsertProxyNorm leave it."""
    gm = traced(randomize_batch_norms(model).double().eval())
    run_pipeline((*preparation_pipeline(), ReplaceBatchNorm(config)), gm)
    return gm


def two_convs(*between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *between, nn.Conv2d(4, 2, 3, padding=1))


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(), nn.Hardswish()], ids=str)
@torch.no_grad()
def test_a_site_computes_its_definition_and_a_warm_start_undoes_it(activation: nn.Module) -> None:
    for config in (WARM, SCRATCH):
        gm = normalized(two_convs(activation), config)
        before, consumer = gm(X), copy.deepcopy(gm.get_submodule("3"))
        result = run(InsertProxyNorm(config), gm)
        assert result.rewritten == 1
        assert not result.notes
        assert called(gm) == [nn.Conv2d, ProxyNormAct, nn.Conv2d]
        site, conv = gm.get_submodule("1"), gm.get_submodule("3")
        assert isinstance(site, ProxyNormAct)
        assert (site.eps, site.proxy_eps) == (1e-5, 0.03)
        z = site_by_hand(gm.get_submodule("0")(X), site, type(activation)())
        assert_same_outputs(gm(X), conv(z), tolerance=1e-7)  # of the grid by hand
        if config is SCRATCH:
            assert torch.equal(conv.weight, consumer.weight)
            assert torch.equal(conv.bias, consumer.bias)
        else:  # padding stands before the shift only once it is routed: compare inside
            assert_same_outputs(gm(X)[..., 1:-1, 1:-1], before[..., 1:-1, 1:-1], tolerance=1e-9)


class Reads(nn.Module):
    """A BatchNorm, and a function of its output."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bn, self.conv, self.relu = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.ReLU()
        self.hooked = nn.ReLU()
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.bn(x))


def overwritten(m: Any, y: Tensor) -> Tensor:
    y[:, :1].mul_(2.0)
    return m.conv(m.relu(y))


def added(m: Any, a: Tensor) -> Tensor:
    return m.conv(a) + a.mean(1, keepdim=True)


def gated(m: Any, a: Tensor) -> Tensor:
    return m.conv(a * a.mean((2, 3), keepdim=True).sigmoid())


REFUSED: dict[str, tuple[str, Callable[[Any, Tensor], Any]]] = {
    "nothing follows": ("PN201", lambda m, y: m.conv(y)),
    "an addition before it": ("PN201", lambda m, y: m.conv(m.relu(y + 1))),
    "an activation with hooks": ("PN201", lambda m, y: m.conv(m.hooked(y))),
    "overwritten through a view": ("PN201", overwritten),
    "an addition": ("PN202", lambda m, y: added(m, m.relu(y))),
    "the output": ("PN202", lambda m, y: m.relu(y)),
    "a gate": ("PN202", lambda m, y: gated(m, m.relu(y))),
    "other activations": ("PN204", lambda m, y: m.conv(m.relu(y)) + m.conv(F.silu(m.bn(y)))),
    "an activation once": ("PN204", lambda m, y: m.conv(m.relu(y)) + m.bn(y).mean()),
    "several": ("PN208", lambda m, y: m.conv(m.relu(y)) + m.conv(F.silu(y))),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_refused_by_code_and_left_as_it_is(name: str) -> None:
    code, function = REFUSED[name]
    gm = normalized(Reads(function), WARM)
    before = gm(X)
    result = untouched(InsertProxyNorm(WARM), gm)
    assert [(note.code, note.site) for note in result.notes] == [(code, "bn")]
    assert [(s.kind, s.code) for s in site_table(gm).values()] == [("norm_only", code)]
    assert_same_outputs(gm(X), before)


def test_switched_off() -> None:
    config = TransformConfig(proxy=False)
    gm = normalized(two_convs(nn.ReLU()), config)
    result = untouched(InsertProxyNorm(config), gm)
    assert [note.code for note in result.notes] == ["PN203"]
    assert site_table(gm)["1"].activation == "relu"


def test_a_normalizer_that_nothing_reads() -> None:
    gm = normalized(Reads(lambda m, y: m.conv(m.relu(y))), WARM)
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    output.args = (next(iter(gm.graph.nodes)),)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    result = untouched(InsertProxyNorm(WARM), gm)
    assert [note.code for note in result.notes] == ["PN102"]


def test_norms_that_were_refused_are_passed_over() -> None:
    gm = normalized(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()), WARM)
    gm = traced(gm)
    result = untouched(InsertProxyNorm(WARM), gm)
    assert not result.notes


@torch.no_grad()
def test_padding_behind_the_shift_is_remarked_on() -> None:
    config = TransformConfig(proxy_padding="output")
    for padding, codes in ((1, ["PN207"]), (0, [])):
        net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=padding))
        gm = normalized(net, config)
        before = gm(X)
        result = run(InsertProxyNorm(config), gm)
        assert result.rewritten == 1
        assert [note.code for note in result.notes] == codes
        inside = slice(padding, -1 if padding else None)
        assert_same_outputs(gm(X)[..., inside, inside], before[..., inside, inside], tolerance=1e-9)


def test_a_second_activation_behind_a_site_stays_there() -> None:
    gm = normalized(two_convs(nn.ReLU(), nn.SiLU()), SCRATCH)
    assert run(InsertProxyNorm(SCRATCH), gm).rewritten == 1
    assert called(gm) == [nn.Conv2d, ProxyNormAct, nn.SiLU, nn.Conv2d]
    assert [(s.kind, s.activation, s.code) for s in site_table(gm).values()] == [("pn", "relu", None)]


def test_a_consumer_without_bias_gets_one_and_frozen_ones_stay_frozen() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1, bias=False)).requires_grad_(False)
    gm = normalized(net, WARM)
    before = gm(X)
    run(InsertProxyNorm(WARM), gm)
    assert gm.get_parameter("2.bias").shape == (2,)
    assert not any(parameter.requires_grad for parameter in gm.parameters())
    assert_same_outputs(gm(X), before, tolerance=1e-9)


def test_shared_modules_stay_shared() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.conv3 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.bn = nn.BatchNorm2d(3)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.bn(self.conv1(x)))
            x = self.relu(self.bn(self.conv2(x)))
            return self.conv3(x)

    net = randomize_batch_norms(Net()).eval()
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert site.kind == "pn"
    assert count_modules(converted, pn_compiler.nn.ProxyNormAct) == 1
    expected = pn_compiler.transform(net, proxy=False)(IMAGES)
    assert_same_outputs(converted(IMAGES), expected)
    assert_same_outputs(pn_compiler.fold(converted)(IMAGES), expected)


def test_a_convolution_shared_by_two_sites_is_no_absorber() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.head = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.bn1(x))) + self.head(F.relu(self.bn2(x)))

    net = randomize_batch_norms(Net()).eval()
    converted = pn_compiler.transform(net)
    assert {s.code for s in pn_compiler.sites(converted)} == {"PN202"}
    assert_same_outputs(converted(IMAGES), pn_compiler.transform(net, proxy=False)(IMAGES))


def test_tied_weights_are_not_compensated() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.conv, self.twin = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.twin.weight = self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.twin(self.conv(F.relu(self.bn(x))))

    net = randomize_batch_norms(Net()).eval()
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert site.code == "PN202"
    assert "shares its weight" in site.reason
    assert_same_outputs(converted(IMAGES), pn_compiler.transform(net, proxy=False)(IMAGES))


def test_a_linear_layer_over_the_last_axis_absorbs_nothing() -> None:
    net = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    net = randomize_batch_norms(net).eval()
    (site,) = pn_compiler.sites(pn_compiler.transform(net))
    assert site.code == "PN202"
    assert "last axis" in site.reason


@pytest.mark.parametrize(("warm_start", "kind"), [("none", "pn"), ("auto", "norm_only")])
def test_untrained_norms_start_plain_and_from_scratch_proxy_normalization_is_everywhere(
    warm_start: WarmStart, kind: str
) -> None:
    net = Reads(lambda m, y: m.relu(y) + 1)
    converted = pn_compiler.transform(net, warm_start=warm_start)
    (site,) = pn_compiler.sites(converted)
    assert (site.kind, site.warm_start) == (kind, False)
    assert torch.equal(converted.get_parameter("bn.weight"), torch.ones(3))


def test_norm_only_bias_can_go() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nn.init.ones_(net[1].bias)
    kept = pn_compiler.transform(net).get_parameter("1.bias")
    dropped = pn_compiler.transform(net, norm_only_bias=False).get_parameter("1.bias")
    assert kept.requires_grad
    assert (kept == 1).all()
    assert not dropped.requires_grad
    assert (dropped == 0).all()
