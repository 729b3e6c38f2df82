"""Activations that a model writes out by hand."""

import math
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bn, self.conv, self.function = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.function(self.bn(x)))


class Swish(torch.autograd.Function):
    """The memory-efficient form, which torch.fx cannot enter."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


class SwishModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Swish.apply(x)


class Noisy(nn.Module):
    """A ReLU in eval mode only; torch.fx does not enter it because it asks for the mode of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e9 and self.training:
            x = x + torch.rand_like(x)
        return F.relu(x)


class Data(nn.Module):
    """A ReLU that is a clamp for large values: a branch that depends on them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if x.max() < 1e9 else x.clamp(0, 1e9)


class Straight(torch.autograd.Function):
    """A clamp whose backward passes everything."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x)
        return x.clamp(0, 6)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        return gradient


class StraightModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(x)


class Bounded(torch.autograd.Function):
    """A ReLU as far as 500."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x)
        return x.clamp(0, 500)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        (x,) = ctx.saved_tensors
        return gradient * ((x > 0) & (x < 500))


class BoundedModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Bounded.apply(x)


KNOWN = {
    "x sigmoid(x)": (lambda y: y * torch.sigmoid(y), nn.SiLU()),
    "x.mul_(x.sigmoid())": (lambda y: y.mul_(y.sigmoid()), nn.SiLU()),
    "x / (1 + exp(-x))": (lambda y: y / (1 + torch.exp(-y)), nn.SiLU()),
    "autograd function": (SwishModule(), nn.SiLU()),
    "x relu6(x + 3) / 6": (lambda y: y * F.relu6(y + 3) / 6, nn.Hardswish()),
    "x hardsigmoid(x)": (lambda y: y * F.hardsigmoid(y), nn.Hardswish()),
    "relu6(x + 3) / 6": (lambda y: F.relu6(y + 3) / 6, nn.Hardsigmoid()),
    "clamp(x / 6 + 1/2, 0, 1)": (lambda y: (y / 6 + 0.5).clamp(0, 1), nn.Hardsigmoid()),
    "x tanh(softplus(x))": (lambda y: y * torch.tanh(F.softplus(y)), nn.Mish()),
    "erf": (lambda y: 0.5 * y * (1 + torch.erf(y / math.sqrt(2))), nn.GELU()),
    "tanh": (lambda y: 0.5 * y * (1 + torch.tanh(0.7978845608 * (y + 0.044715 * y**3))), nn.GELU("tanh")),
    "sigmoid": (lambda y: 1 / (1 + torch.exp(-y)), nn.Sigmoid()),
    "stable softplus": (lambda y: y.clamp(min=0) + torch.log1p(torch.exp(-y.abs())), nn.Softplus()),
    "elu": (lambda y: torch.where(y > 0, y, torch.exp(y) - 1), nn.ELU()),
    "max(x, 0.1 x)": (lambda y: torch.max(y, 0.1 * y), nn.LeakyReLU(0.1)),
    "leaky where": (lambda y: torch.where(y >= 0, y, y * -0.5), nn.LeakyReLU(-0.5)),
    "relu(x) - 0.2 relu(-x)": (lambda y: F.relu(y) - 0.2 * F.relu(-y), nn.LeakyReLU(0.2)),
    "maximum": (lambda y: torch.maximum(y, torch.zeros_like(y)), nn.ReLU()),
    "maximum of a constant": (lambda y: torch.maximum(y, torch.tensor(0.0)), nn.ReLU()),
    "where": (lambda y: torch.where(y > 0, y, torch.zeros_like(y)), nn.ReLU()),
    "x (x > 0)": (lambda y: y * (y > 0), nn.ReLU()),
    "(x + |x|) / 2": (lambda y: (y + y.abs()) / 2, nn.ReLU()),
    "masked_fill": (lambda y: y.masked_fill(y < 0, 0.0), nn.ReLU()),
    "clamp without an upper bound": (lambda y: torch.clamp(y, 0, math.inf), nn.ReLU()),
    "a mask of floats": (lambda y: y * (y > 0).type_as(y), nn.ReLU()),
    "|x|": (abs, nn.LeakyReLU(-1.0)),
    "1 - relu(1 - x)": (lambda y: 1 - F.relu(1 - y), nn.Hardtanh(-math.inf, 1.0)),
    "softplus with a threshold": (lambda y: F.softplus(y, 1.0, 1.0), nn.Softplus(1.0, 1.0)),
    "softplus switched at 20": (
        lambda y: torch.where(y > 20, y, torch.log1p(torch.exp(y))),
        nn.Softplus(),
    ),
    "selu": (
        lambda y: 1.0507009873554805 * torch.where(y > 0, y, 1.6732632423543772 * (torch.exp(y) - 1)),
        nn.SELU(),
    ),
    "clamp_min": (lambda y: y.clamp_min(-0.5), nn.Hardtanh(-0.5, math.inf)),
    "clamp(max=3)": (lambda y: y.clamp(max=3), nn.Hardtanh(-math.inf, 3.0)),
    "clamp without a lower bound": (lambda y: y.clamp(-math.inf, 1), nn.Hardtanh(-math.inf, 1.0)),
    "two clamps": (lambda y: y.clamp_min(0).clamp_max(40), nn.Hardtanh(0.0, 40.0)),
    "relu of a clamp": (lambda y: F.relu(y.clamp(max=35)), nn.Hardtanh(0.0, 35.0)),
    "min of relu": (lambda y: torch.minimum(F.relu(y), torch.full_like(y, 6.0)), nn.ReLU6()),
    "threshold by function": (lambda y: F.threshold(y, 0.3, -1.0), nn.Threshold(0.3, -1.0)),
    "threshold": (lambda y: torch.where(y > -40, y, 0.0), nn.Threshold(-40.0, 0.0)),
}


def leaves(function: object) -> list[str]:
    """A module is known by its values only where it is not looked into."""
    return ["function"] if isinstance(function, nn.Module) else []


@pytest.mark.parametrize("name", KNOWN)
def test_known_by_their_values(name: str) -> None:
    function, expected = KNOWN[name]
    net = randomize_batch_norms(Written(function)).eval()
    converted = pn_compiler.transform(net, leaves=leaves(function))
    (site,) = pn_compiler.sites(converted)
    activation = converted.get_submodule("bn").activation
    assert site.kind == "pn"
    assert (type(activation), activation.extra_repr()) == (type(expected), expected.extra_repr())
    assert_same_outputs(converted(X), pn_compiler.transform(net, proxy=False)(X))
    assert_same_outputs(pn_compiler.fold(converted)(X), converted(X))


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing of torch.nn": lambda y: y * torch.sigmoid(1.702 * y),
    "not elementwise": lambda y: y * torch.sigmoid(y.mean()),
    "something else reads y": lambda y: y * torch.sigmoid(y) + y.flip(-1),
    "noise": Noisy(),
    "a branch on values": Data(),
    "a backward of its own": StraightModule(),
    "a bound at 500": BoundedModule(),
    "a bound within": lambda y: y * torch.sigmoid(y.clamp(-50, 50)),
    "a bound around": lambda y: y.clamp(-50, 50) * torch.sigmoid(y.clamp(-50, 50)),
    "a kink far out": lambda y: torch.where(y > 700, y - 1, y * torch.sigmoid(y)),
    "a jump at 0": lambda y: torch.where(y >= 0, y, y - 1),
    "another value at the edge": lambda y: torch.where(y >= -2, y, 0.0),
    "a shift": lambda y: torch.where(y > 1e-3, y - 1e-3, 0.0),
    "overflows": lambda y: (torch.exp(y) - torch.exp(-y)) / (torch.exp(y) + torch.exp(-y)),
    "absolute value": lambda y: y.abs() - 1,
    "a constant": lambda y: y.clamp(2.0, 1.0),
    "a constant, from equal bounds": lambda y: y.clamp(1.0, 1.0),
    "another constant": lambda y: F.hardtanh(y, 1.0, 1.0),
    "overwritten before it is read": lambda y: y.mul_(2) + y.add_(1).clamp(min=0),
    "a disjunction": lambda y: y * ((y > 0) + (y > 1)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_others_are_left_alone(name: str) -> None:
    function = UNKNOWN[name]
    net = randomize_batch_norms(Written(function)).eval()
    with torch.no_grad():  # so that activations come far
        net.bn.weight.mul_(torch.tensor([1.0, 30.0, 1000.0]))
    converted = pn_compiler.transform(net, leaves=leaves(function))
    (site,) = pn_compiler.sites(converted)
    assert site.kind == "norm_only"
    expected = net.conv(function(converted.get_submodule("bn")(X)))
    assert_same_outputs(converted(X).nan_to_num(-7.0), expected.nan_to_num(-7.0))


def test_an_expression_that_changes_the_dtype_is_left_alone() -> None:
    function = Written(lambda y: y * (y > 0).float())
    function.conv = nn.Identity()
    net = randomize_batch_norms(function).eval()
    for dtype, kind in ((torch.float32, "pn"), (torch.bfloat16, "norm_only")):
        converted = pn_compiler.transform(net.to(dtype), warm_start="none")
        (site,) = pn_compiler.sites(converted)
        assert site.kind == kind
        assert converted(X.to(dtype)).dtype == net(X.to(dtype)).dtype


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("warm_start", ["none", "running_stats"])
def test_equal_far_out(name: str, warm_start: str) -> None:
    function, _ = KNOWN[name]
    net = randomize_batch_norms(Written(function)).eval().double()
    with torch.no_grad():
        net.bn.weight.mul_(torch.tensor([1.0, 30.0, 1000.0]))
    x = X.double()
    converted = pn_compiler.transform(net, warm_start=warm_start, leaves=leaves(function))
    plain = pn_compiler.transform(net, warm_start=warm_start, proxy=False)
    site = converted.get_submodule("bn")
    affine = plain.get_submodule("bn")(x)
    assert_same_outputs(plain(x), net.conv(function(affine.clone())))
    assert_same_outputs(site.activation(affine), function(affine.clone()))
    assert_same_outputs(pn_compiler.fold(converted)(x), converted(x))


@pytest.mark.parametrize("name", ["clamp_min", "clamp(max=3)", "two clamps", "threshold"])
def test_one_sided_bounds_are_exported(name: str, tmp_path: Path) -> None:
    net = randomize_batch_norms(Written(KNOWN[name][0])).eval()
    for proxy in (True, False):
        converted = pn_compiler.transform(net, proxy=proxy)
        path = tmp_path / f"{proxy}.onnx"
        pn_compiler.export_onnx(converted, path, X)
        session = onnxruntime.InferenceSession(path)
        (actual,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
        assert_same_outputs(torch.from_numpy(actual), converted(X))


class Part(nn.Module):
    """A convolution, a BatchNorm and an activation, for a caller that overwrites what it returns."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.function = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.bn(self.conv(x)))


class Overwriting(nn.Module):
    """Stays whole, for it branches on values; and writes to what its child returns, if `in_place`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.in_place = Part(function), True

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x) if x.sum() < 1e9 else x
        return F.leaky_relu(y, 0.2, inplace=self.in_place)


NOT_KEEPING_OUTPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "x (x > 0)": lambda y: y * (y > 0),
    "where": lambda y: torch.where(y > 0, y, 0.0),
    "clamp": lambda y: y.clamp(min=0),
    "a view of it": lambda y: torch.clamp_min(y, 0).flatten(1),
    "sigmoid": lambda y: 1 / (1 + torch.exp(-y)) * 1,
    "tanh": lambda y: 2 / (1 + torch.exp(-2 * y)) - 1,
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", NOT_KEEPING_OUTPUT)
def test_a_caller_may_overwrite_the_result(name: str, inside: bool) -> None:
    """It trains, as the original does: some activations of torch.nn need for the gradient what is gone."""
    net = randomize_batch_norms(Overwriting(NOT_KEEPING_OUTPUT[name])).double().eval()
    net(X.double()).square().sum().backward()  # the original can be trained
    if inside:
        net = pn_compiler.transform(net, proxy=False)
    else:
        net.part = pn_compiler.transform(net.part)
    gradients = []
    for net.in_place in (True, False):
        net.zero_grad()
        net(X.double()).square().sum().backward()
        gradients.append(net.get_parameter("part.conv.weight").grad)
    assert_same_outputs(*gradients)
