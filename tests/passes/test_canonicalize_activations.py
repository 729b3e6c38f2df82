"""Activations in every spelling become modules; writes that nothing else sees become values."""

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.operators.activations import activation_functions
from pn_compiler.passes.prepare.canonicalize_activations import CanonicalizeActivations
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests.passes.graphs import called, run, traced, untouched

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
X = 4 * IMAGES.double()  # beyond the bounds of all clips


class Function(nn.Module):
    """A function of what a convolution gives."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 3, 1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


OPTIONS: dict[str, tuple[float, ...]] = {
    "threshold": (0.1, -2.0), "_threshold": (0.1, -2.0), "clamp": (-1.0, 2.0), "clip": (-1.0, 2.0),
    "clamp_min": (-0.3,), "clamp_max": (0.3,),
}  # fmt: skip
FUNCTIONS = sorted({f"{f.__module__ or 'torch'}.{f.__name__}": f for f in activation_functions()}.items())
METHODS = sorted(
    name
    for plain in {function.__name__ for _, function in FUNCTIONS}
    for name in (plain, f"{plain}_")
    if hasattr(Tensor, name)
)


@torch.no_grad()
def check(spell: Callable[[Tensor], Tensor]) -> None:
    """`spell` becomes one module that computes the same; the model of the caller stays."""
    model = Function(spell).double().eval()
    gm = traced(model)
    assert run(CanonicalizeActivations(), gm).rewritten >= 1
    _, activation = called(gm)
    assert activation.__module__ == "torch.nn.modules.activation"
    assert [node.op for node in gm.graph.nodes] == ["placeholder", *["call_module"] * 2, "output"]
    assert_same_outputs(gm(X), spell(model.conv(X)))
    assert not any(module.training for module in gm.modules())


@pytest.mark.parametrize("name", dict(FUNCTIONS))
def test_every_function_becomes_a_module(name: str) -> None:
    function = dict(FUNCTIONS)[name]
    options = OPTIONS.get(function.__name__, ())
    check(lambda y: function(y, *options))
    if "inplace" in str(inspect.signature(function) if inspect.isfunction(function) else ""):
        check(lambda y: function(y, *options, inplace=True))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_becomes_a_module(name: str) -> None:
    options = OPTIONS.get(name.removesuffix("_"), ())
    check(lambda y: getattr(y, name)(*options))


def returned(y: Tensor, _: Any) -> Tensor:
    return y


LEFT: dict[str, Callable[[Tensor], Any]] = {
    "no activation": torch.sin,
    "computed bounds": lambda y: y.clamp(0.0, y.mean()),
    "crossed bounds": lambda y: y.clamp(2.0, 1.0),
    "no bounds": lambda y: y.clamp(-math.inf, math.inf),
    "a scaled elu": lambda y: torch.ops.aten.elu.default(y, 1.0, 2.0),
    "integers": lambda y: y.long().clamp(0, 2),
    "perhaps integers": lambda y: torch.round(y).clamp(0, 2),
    "a view shows it": lambda y: returned(y, y[:, :2].relu_()),
    "a piece shows it": lambda y: returned(y, y.chunk(3, 1)[1].mul_(2.0)),
}


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_left_alone(name: str) -> None:
    model = Function(LEFT[name]).double()
    gm = traced(model)
    untouched(CanonicalizeActivations(), gm)
    assert_same_outputs(gm(X), LEFT[name](model.conv(X)))


@pytest.mark.parametrize("function", [lambda y: y.long().relu(), lambda y: (y > 0).clamp(0, 1)])
def test_integers_and_booleans_of_an_example_stay(function: Callable[[Tensor], Tensor]) -> None:
    gm = traced(Function(function).double(), X)
    untouched(CanonicalizeActivations(), gm)


@pytest.mark.parametrize("write", [F.relu_, lambda x: x.mul_(2.0), lambda x: operator.iadd(x, 1)])
def test_what_the_caller_sees_stays_a_write(write: Callable[[Tensor], Tensor]) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            write(x)
            return x + 1

    gm = traced(Writes())
    CanonicalizeActivations()(gm)
    own, expected = X.clone(), X.clone()
    write(expected)
    assert_same_outputs(gm(own), expected + 1)
    assert torch.equal(own, expected)


def test_a_sum_in_place_of_another_dtype_stays() -> None:
    def widened(y: Tensor) -> Tensor:
        z = y.float() + 1
        z += y
        return z

    gm = traced(Function(widened).double(), X)
    untouched(CanonicalizeActivations(), gm)
    assert gm(X).dtype == torch.float32


def read_later(y: Tensor) -> Tensor:
    F.relu_(y)
    return y + 1


def summed(y: Tensor) -> Tensor:
    z = y.abs()
    z += y
    return z


IN_PLACE: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "read under the old name": (2, read_later),  # the edge, and the function
    "a sum": (1, summed),
    "a bit": (1, lambda y: operator.iand(y > 0, y < 1)),
}


@pytest.mark.parametrize("name", IN_PLACE)
@torch.no_grad()
def test_writes_that_nothing_else_sees_become_values(name: str) -> None:
    rewritten, function = IN_PLACE[name]
    model = Function(function).double()
    gm = traced(model)
    assert run(CanonicalizeActivations(), gm).rewritten == rewritten
    names = [getattr(node.target, "__name__", "") for node in gm.graph.nodes]
    assert not {"relu_", "iadd", "iand"}.intersection(names)
    assert_same_outputs(gm(X), function(model.conv(X)))


@pytest.mark.parametrize(
    ("activate", "expected"),
    [(lambda y: y.clamp(min=0), nn.Hardtanh), (F.relu, nn.ReLU), (torch.sigmoid, nn.Sigmoid)],
)
def test_a_clamp_whose_output_is_overwritten_needs_its_input_for_the_gradient(
    activate: Callable[[Tensor], Tensor], expected: type[nn.Module]
) -> None:
    def function(y: Tensor) -> Tensor:
        z = activate(y)
        z[:, :1].mul_(2.0)
        return z

    model = Function(function).double()
    gm = traced(model)
    assert run(CanonicalizeActivations(), gm).rewritten == 1
    assert called(gm) == [nn.Conv2d, expected]
    if expected is nn.Hardtanh:
        gm(X).square().sum().backward()
        function(model.conv(X)).square().sum().backward()
        assert_same_outputs(gm.get_parameter("conv.weight").grad, model.conv.weight.grad)
    with torch.no_grad():
        assert_same_outputs(gm(X), function(model.conv(X)))


def test_identities_go_but_those_with_hooks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.Identity()).double()
    model[2].register_forward_hook(lambda module, args, output: output * 2)
    gm = traced(model)
    assert run(CanonicalizeActivations(), gm).rewritten == 1
    assert called(gm) == [nn.Conv2d, nn.Identity]
    assert_same_outputs(gm(X), model(X))


class Spelled(nn.Module):
    """One site whose activation is a function or method."""

    def __init__(self, spell: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)
        self.spell = spell

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.spell(self.bn(self.conv1(x))))


SPELLINGS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "F.relu": ("relu", F.relu),
    "F.relu inplace": ("relu", lambda x: F.relu(x, inplace=True)),
    "F.relu_": ("relu", F.relu_),
    "torch.relu": ("relu", torch.relu),
    "x.relu": ("relu", lambda x: x.relu()),
    "x.relu_": ("relu", lambda x: x.relu_()),
    "x.clamp(min=0)": ("relu", lambda x: x.clamp(min=0)),
    "torch.clamp(0, 6)": ("relu6", lambda x: torch.clamp(x, 0, 6)),
    "F.relu6": ("relu6", F.relu6),
    "F.hardtanh": ("hardtanh", lambda x: F.hardtanh(x, -1, 2)),
    "F.leaky_relu": ("leakyrelu", lambda x: F.leaky_relu(x, 0.2)),
    "F.leaky_relu keyword": ("leakyrelu", lambda x: F.leaky_relu(x, negative_slope=0.2)),
    "F.silu": ("silu", F.silu),
    "F.gelu": ("gelu", F.gelu),
    "F.gelu tanh": ("gelu", lambda x: F.gelu(x, approximate="tanh")),
    "F.hardswish": ("hardswish", F.hardswish),
    "F.elu": ("elu", lambda x: F.elu(x, 0.5)),
    "torch.sigmoid": ("sigmoid", torch.sigmoid),
    "x.sigmoid": ("sigmoid", lambda x: x.sigmoid()),
    "x.tanh_": ("tanh", lambda x: x.tanh_()),
    "F.mish": ("mish", F.mish),
    "F.softplus": ("softplus", F.softplus),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_functions_and_methods_are_recognised(name: str) -> None:
    activation, spell = SPELLINGS[name]
    net = randomize_batch_norms(Spelled(spell)).eval()
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert (site.name, site.kind, site.activation) == ("bn", "pn", activation)
    expected = pn_compiler.transform(net, proxy=False)(IMAGES)
    assert_same_outputs(converted(IMAGES), expected)
    assert_same_outputs(pn_compiler.fold(converted)(IMAGES), expected)


def test_an_activation_with_computed_bounds_is_none() -> None:
    net = randomize_batch_norms(Spelled(lambda x: torch.clamp(x, 0, x.mean()))).eval()
    (site,) = pn_compiler.sites(pn_compiler.transform(net))
    assert (site.kind, site.code) == ("norm_only", "PN201")
