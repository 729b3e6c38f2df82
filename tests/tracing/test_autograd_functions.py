"""Backwards that are written by hand are kept, and so is what a forward itself differentiates."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.testing import randomize_batch_norms
from tests.tracing.networks import by_hand

X = torch.randn(3, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Swish(torch.autograd.Function):
    """The memory-efficient form: its backward is that of SiLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float = 1.0) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


class Rounded(torch.autograd.Function):
    """A straight-through estimator in the newer form."""

    @staticmethod
    def forward(x: Tensor, steps: int) -> Tensor:
        return torch.round(x * steps) / steps

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Halves(torch.autograd.Function):
    """Several outputs, one of them without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = x > 0
        ctx.mark_non_differentiable(mask)
        return x * 0.5, mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Tensor:
        return gradient * 7


class Written(torch.autograd.Function):
    """Overwrites its input, and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


class Called(torch.autograd.Function):
    """Runs code that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * 5, None


swish = Swish.apply
rounded = Rounded.apply
TABLE = {"round": Rounded.apply}


def through_a_helper(x: Tensor) -> Tensor:
    return Reversed.apply(x, 0.3)


def halves(x: Tensor) -> Tensor:
    half, mask = Halves.apply(x)
    return half * mask


class Net(nn.Module):
    """The function stands behind a BatchNorm, and its result is read by a convolution."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.out(F.relu(self.function(self, self.bn(self.conv(x)))))


class Whole(nn.Module):
    """Without state; the function is all there is."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "applied": lambda net, y: Reversed.apply(y),
    "saved": lambda net, y: Swish.apply(y - 0.1),
    "alias": lambda net, y: swish(y * 2),
    "alias in a dict": lambda net, y: TABLE["round"](y, 8),
    "helper": lambda net, y: through_a_helper(y),
    "numbers": lambda net, y: rounded(y, 4),
    "several outputs": lambda net, y: halves(y),
    "twice": lambda net, y: Reversed.apply(Reversed.apply(y, 2.0), 0.5),
    "parameter": lambda net, y: y * Reversed.apply(net.scale, 0.5),
    "weight": lambda net, y: F.conv2d(y, Rounded.apply(net.out.weight, 16)).repeat(1, 2, 1, 1),
    "in place": lambda net, y: Written.apply(y + 1),
    "in place of a norm": lambda net, y: Written.apply(y),
    "training": lambda net, y: Reversed.apply(y, net.training),
    "code": lambda net, y: Called.apply(y, torch.sin),
    "module": lambda net, y: Called.apply(y, net.bn),
    "lambda": lambda net, y: Called.apply(y, lambda z: net.scale * z),
}


def make(function: Callable[[Any, Tensor], Tensor], *, train: bool) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(Net(function)).double().train(train)


def gradients(net: nn.Module) -> list[Tensor]:
    """Output, and gradients of the input and of the parameters that both networks have."""
    net.zero_grad(set_to_none=True)
    x = X.clone().requires_grad_()
    y = net(x)
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    gradients = [net.get_parameter(name).grad for name in ("conv.weight", "bn.weight", "bn.bias", "scale")]
    return [y.detach(), x.grad, *(torch.zeros(1) if g is None else g for g in gradients)]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_the_backward_is_kept(name: str, train: bool, given: bool) -> None:
    net = make(FORMS[name], train=train)
    converted = pn_compiler.transform(net, X if given else None, proxy=False)
    for actual, expected in zip(gradients(converted), gradients(by_hand(net, converted)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    sites = {site.name: site.kind for site in pn_compiler.sites(converted)}
    assert sites["bn"] == ("skipped" if "batch_norm" in name else "norm_only")


@pytest.mark.parametrize("name", ["code", "module", "lambda"])
def test_code_in_the_arguments_keeps_the_module_whole(name: str) -> None:
    converted = pn_compiler.transform(make(FORMS[name], train=False), X)
    assert "PN122" in {note.code for note in pn_compiler.notes(converted)}
    assert isinstance(converted, Net)


def test_the_function_is_applied_by_the_graph() -> None:
    converted = pn_compiler.transform(make(FORMS["alias"], train=False), X)
    assert isinstance(converted, torch.fx.GraphModule)
    called = [converted.get_submodule(str(n.target)) for n in converted.graph.nodes if n.op == "call_module"]
    assert [module.function for module in called if hasattr(module, "function")] == [Swish]


@pytest.mark.parametrize("written", [False, True])
def test_an_activation_is_recognised(written: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Whole(swish), nn.Conv2d(4, 2, 1))
    if written:
        net = Net(lambda _, y: Swish.apply(y))
        net.forward = lambda x: net.out(swish(net.bn(net.conv(x))))  # type: ignore[method-assign]
    converted = pn_compiler.transform(randomize_batch_norms(net).eval(), X.float())
    assert [(site.kind, site.activation) for site in pn_compiler.sites(converted)] == [("pn", "silu")]


def test_other_slopes_are_no_activation() -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return F.relu(x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Whole(Straight.apply), nn.Conv2d(4, 2, 1))
    converted = pn_compiler.transform(randomize_batch_norms(net).eval(), X.float())
    assert [site.code for site in pn_compiler.sites(converted)] == ["PN201"]


def test_copies_and_pickles() -> None:
    converted = pn_compiler.transform(make(function_of_this_module, train=False), X)
    expected = converted(X)
    for again in (
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        pn_compiler.fold(converted),
    ):
        torch.testing.assert_close(again(X), expected)


def function_of_this_module(net: Any, y: Tensor) -> Tensor:
    return Rounded.apply(y, 4)


def test_names_of_the_model_stay() -> None:
    net = make(FORMS["helper"], train=False)
    keys = {key for key in net.state_dict() if "running" not in key and "tracked" not in key}
    before = dict(vars(net))
    assert keys <= pn_compiler.transform(net, X).state_dict().keys()
    assert vars(net).keys() == before.keys()


def test_torch_is_left_as_it_was() -> None:
    code = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    pn_compiler.transform(make(FORMS["code"], train=False), X)
    assert torch.autograd.Function.apply.__func__.__code__ is code  # type: ignore[attr-defined]
    x = X.clone().requires_grad_()
    Reversed.apply(x, 2.0).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(X, -2.0))


class NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


norm_function = NormFunction.apply


def test_batch_norm_behind_an_alias_is_reported() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Whole(norm_function))
    assert [site.code for site in pn_compiler.sites(pn_compiler.transform(net, X.float()))] == ["PN120"]


# --- torch.func ------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "vmap": lambda net, y: torch.func.vmap(lambda one: one * one.mean())(y),
    "vmap over parameters": lambda net, y: torch.func.vmap(
        lambda one: one * net.scale, in_dims=1, out_dims=1
    )(y),
    "grad": lambda net, y: torch.func.grad(lambda z: z.pow(3).sum())(y),
    "jvp": lambda net, y: torch.func.jvp(torch.sin, (y,), (y,))[1],
    "vjp": lambda net, y: torch.func.vjp(torch.sin, y)[1](y)[0],
    "jacrev": lambda net, y: torch.func.jacrev(lambda z: z.pow(3).sum((1, 2, 3)))(y).sum(0),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own use of it
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_compute_the_same(name: str, train: bool) -> None:
    net = make(TRANSFORMS[name], train=train)
    converted = pn_compiler.transform(net, X, proxy=False)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]
    for actual, expected in zip(gradients(converted), gradients(by_hand(net, converted)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def retained(net: Any, y: Tensor) -> Tensor:
    y.retain_grad()
    return y


def hooked(net: Any, y: Tensor) -> Tensor:
    y.register_hook(torch.neg)
    return y


def stepped(net: Any, y: Tensor) -> Tensor:
    y.square().mean().backward(retain_graph=True)
    return y


def inner(net: Any, y: Tensor) -> Tensor:
    (result,) = torch.autograd.grad((y + net.scale).pow(3).sum(), y, create_graph=True)
    return result


def enabled(net: Any, y: Tensor) -> Tensor:
    y.detach().requires_grad_()
    return y


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("function", [retained, hooked, stepped, inner, enabled])
def test_gradients_inside_a_forward(function: Callable[[Any, Tensor], Tensor], train: bool) -> None:
    net = make(function, train=train)
    converted = pn_compiler.transform(net, proxy=False)
    assert isinstance(converted, Net)  # kept whole
    assert function is hooked or "PN123" in {note.code for note in pn_compiler.notes(converted)}
    for actual, expected in zip(gradients(converted), gradients(by_hand(net, converted)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
