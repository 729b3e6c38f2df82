"""Writes that are seen under another name: views, pieces, results of writes, modules that are not traced."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.graph.aliases import find_aliases, shares, writes
from pn_compiler.nn import ConstantAffine
from pn_compiler.passes.freeze.absorb_constants import AbsorbConstants
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from pn_compiler.tracing.trace_module import trace_module

X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Opaque(nn.Module):
    """torch.fx cannot trace it: it branches on values."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x) if x.sum() > -1e30 else x


class Net(nn.Module):
    """A BatchNorm of 6 channels and `tail`, which is given the module and its output."""

    def __init__(self, tail: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.conv, self.other = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1)
        self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.3)
        self.dropout_ = nn.Dropout(0.3, inplace=True)
        self.same, self.doubles = Opaque(lambda x: x), Opaque(lambda x: x.mul_(2) + 1)
        self.tail = tail

    def forward(self, x: Tensor) -> Any:
        return self.tail(self, self.bn(self.first(x)))


def _behind_a_write_to_a_view(m: Any, y: Tensor) -> Tensor:
    v = y.flatten(2)
    z = v.add_(1.0)
    F.relu_(z)
    return m.conv(v.view(y.shape))


def _piece(m: Any, y: Tensor) -> Tensor:
    a = y[:, :2]
    a.mul_(2.0)
    return m.conv(F.relu(y))


def _piece_of_the_activation(m: Any, y: Tensor) -> Tensor:
    z = F.relu(y)
    z[:, :2].mul_(2.0)
    return m.conv(z)


def _plus_on_a_split(m: Any, y: Tensor) -> Tensor:
    z = F.relu(y)
    a, _ = z.split([2, 4], 1)
    a += 1.0
    return m.conv(z)


def _plus_on_a_narrow(m: Any, y: Tensor) -> Tensor:
    z = F.silu(y)
    a = z.narrow(1, 1, 3)
    a *= 3.0
    return m.conv(z)


def _list_of_pieces(m: Any, y: Tensor) -> Tensor:
    z = F.relu(y)
    pieces = list(z.chunk(3, dim=1))
    pieces[1] += 1.0
    return m.conv(z)


def _through(view: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The output of the BatchNorm is overwritten through what may be a view of it."""

    def tail(m: Any, y: Tensor) -> Tensor:
        view(m, y).add_(0.5)
        return m.conv(F.relu(y))

    return tail


def _activation_through(view: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The same, by an activation in place, which the output shows."""

    def tail(m: Any, y: Tensor) -> Tensor:
        F.relu_(view(m, y))
        return m.conv(y)

    return tail


VIEWS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dropout": lambda m, y: F.dropout(y, 0.3, training=False),
    "a module of dropout": lambda m, y: m.dropout(y),
    "dropout in place": lambda m, y: m.dropout_(y),
    "contiguous": lambda m, y: y.contiguous(),
    "to": lambda m, y: y.to(torch.float64),
    "double": lambda m, y: y.double(),
    "type_as": lambda m, y: y.type_as(y),
    "expand_as": lambda m, y: y.expand_as(y),
    "data": lambda m, y: y.data,
    "detach": lambda m, y: y.detach(),
    "mT": lambda m, y: y.mT,
    "real": lambda m, y: y.real,
    "as_tensor": lambda m, y: torch.as_tensor(y),
    "einsum": lambda m, y: torch.einsum("nchw->nhwc", y),
    "pixel_shuffle": lambda m, y: F.pixel_shuffle(y, 1),
    "atleast_1d": lambda m, y: torch.atleast_1d(y),
    "unbind": lambda m, y: y.unbind(1)[2],
    "select": lambda m, y: y.select(1, 2),
    "views of views": lambda m, y: y.flatten(2)[:, 1:].transpose(1, 2),
    "positive": lambda m, y: +y,
    "requires_grad_": lambda m, y: y.requires_grad_(False).view(-1),
    "masked_fill_": lambda m, y: y.view(2, -1).masked_fill_(y.view(2, -1) > 1, 0.3),
    "copy_": lambda m, y: y.flatten(1).copy_(y.flatten(1) * 3),
    "index_fill_": lambda m, y: y.flatten(2).index_fill_(1, torch.tensor([0]), 0.7),
    "a module that is not traced": lambda m, y: m.same(y),
}


def _items(m: Any, y: Tensor) -> Any:
    y[:, 0] = 0
    return m.conv(F.relu(y))


def _items_of_the_activation(m: Any, y: Tensor) -> Any:
    z = F.relu(y)
    z[:, 1:3, 0] = y[:, 1:3, 0] * 5
    return m.conv(z)


def _items_of_a_view(m: Any, y: Tensor) -> Any:
    y.flatten(2)[:, 2:, 1:] = 0.5
    return m.conv(F.relu(y))


def _masked(m: Any, y: Tensor) -> Any:
    y[y > 0.5] = 0.25
    return m.conv(F.relu(y))


def _named_before(m: Any, y: Tensor) -> Any:
    before, first = F.relu(y), y[:, :1]
    y[..., None][:, 0] = y.mean()
    return m.conv(F.relu(y)), m.conv(before), first


def _items_plus(m: Any, y: Tensor) -> Any:
    y[:, 1] += y[:, 2]
    return m.conv(F.relu(y))


def _written_by_a_module(m: Any, y: Tensor) -> Tensor:
    z = F.relu(y)
    return m.doubles(z).mean() + m.conv(z)


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "behind a write to a view": _behind_a_write_to_a_view,
    "a piece": _piece,
    "a piece of the activation": _piece_of_the_activation,
    "+= on a split": _plus_on_a_split,
    "*= on a narrow": _plus_on_a_narrow,
    "a list of pieces": _list_of_pieces,
    "a positional inplace": lambda m, y: (F.relu(y.view(2, -1), True), m.conv(y))[1],
    "hardtanh, positional": lambda m, y: (F.hardtanh(y.view(2, -1), 0.0, 1.0, True), m.conv(y))[1],
    "out=": lambda m, y: (torch.clamp(y, 0, 1, out=y.view(2, 6, 4, 4)), m.conv(F.relu(y)))[1],
    "foreach": lambda m, y: (torch._foreach_mul_([y.flatten(2)], 2.0), m.conv(F.relu(y)))[1],
    "a module in place on a view": lambda m, y: (m.relu(y[:, 1:]), m.conv(y))[1],
    "a module that writes": lambda m, y: (m.doubles(y), m.conv(F.relu(y)))[1],
    "a module that writes, unread": lambda m, y: (m.doubles(y), y)[1],
    "a module that writes into the activation": _written_by_a_module,
    "items": _items,
    "items of the activation": _items_of_the_activation,
    "items of a view": _items_of_a_view,
    "items where a mask is": _masked,
    "items under a name of before": _named_before,
    "items += 1": _items_plus,
    "written twice": lambda m, y: (F.relu_(y.view(2, -1)).add_(1), m.conv(y), y[:, 0])[1:],
    "read before and after": lambda m, y: (v := y.view(2, -1), m.other(F.relu(y)), v.neg_(), m.conv(y))[1:],
} | {
    f"{kind}{name}": through(view)
    for name, view in VIEWS.items()
    for kind, through in (("", _through), ("relu, ", _activation_through))
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_a_write_is_seen_under_every_name(name: str) -> None:
    net = randomize_batch_norms(Net(WRITES[name])).double().eval()
    by_hand = copy.deepcopy(net)
    by_hand.bn = pn_compiler.transform(net, proxy=False).get_submodule("bn")
    expected = by_hand(X)
    for model in (
        pn_compiler.transform(net, proxy=False), pn_compiler.transform(net), pn_compiler.transform(net, X)
    ):  # fmt: skip
        assert_same_outputs(model(X), expected, tolerance=1e-9)
        assert_same_outputs(pn_compiler.fold(model)(X), expected, tolerance=1e-9)
    scratch = pn_compiler.transform(net, warm_start="none")
    for parameter in scratch.parameters():
        parameter.add_(0.1)
    assert_same_outputs(pn_compiler.fold(scratch)(X), scratch(X), tolerance=1e-9)


def _residual(m: Any, y: Tensor) -> Tensor:
    out = y
    out += m.other(y).mean()
    return m.conv(m.relu(out))


RECOGNISED: dict[str, Callable[[Any, Tensor], Any]] = {
    "in place, unread": lambda m, y: (F.relu_(y), m.conv(y))[1],
    "a module in place": lambda m, y: m.conv(m.relu(y)),
    "positional": lambda m, y: m.conv(F.relu6(y, True)),
    "views of the result": lambda m, y: m.conv(F.relu_(y).flatten(2).view(2, 6, 4, 4)),
    "read before": lambda m, y: (m.other(y), m.conv(F.relu_(y))),
    "the shape read after": lambda m, y: (F.relu_(y), m.conv(y) * y.size(2))[1],
}


@pytest.mark.parametrize("name", RECOGNISED)
@torch.no_grad()
def test_a_write_that_nothing_else_sees_is_no_obstacle(name: str) -> None:
    net = randomize_batch_norms(Net(RECOGNISED[name])).double().eval()
    converted = pn_compiler.transform(net, warm_start="none")
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    warm, plain = pn_compiler.transform(net), pn_compiler.transform(net, proxy=False)
    assert_same_outputs(warm(X), plain(X), tolerance=1e-9)
    by_hand = copy.deepcopy(net)
    by_hand.bn = plain.get_submodule("bn")
    assert_same_outputs(plain(X), by_hand(X), tolerance=1e-9)


def test_numbers_are_not_overwritten() -> None:
    """n += 1 makes another number: who read n before it, and who reads it now, reads the old one."""

    def tail(m: Any, y: Tensor) -> Tensor:
        n = height = y.size(2)
        n += 1
        return m.conv(F.relu(y)) * n + height

    net = randomize_batch_norms(Net(tail)).double().eval()
    converted = pn_compiler.transform(net)
    by_hand = copy.deepcopy(net)
    by_hand.bn = pn_compiler.transform(net, proxy=False).get_submodule("bn")
    assert_same_outputs(converted(X), by_hand(X), tolerance=1e-9)


def test_the_caller_sees_what_the_forward_writes_and_conversion_writes_nothing() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2.0)
            return F.relu(self.bn(F.relu_(x)))

    example = X.float()
    converted = pn_compiler.transform(Writes().eval(), example)
    assert torch.equal(example, X.float())
    converted(example)
    assert torch.equal(example, (X.float() * 2).relu())


def test_a_constant_affine_of_what_is_overwritten_later_stays() -> None:
    """Behind it the convolution would read the tensor when it is overwritten."""

    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.affine = ConstantAffine(torch.rand(3).double(), torch.rand(3).double())
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            y = self.affine(h)
            h2 = h.add_(1.0)
            return self.conv(y) + h2

    net = Later().double().eval()
    gm, _, _ = trace_module(copy.deepcopy(net))
    AbsorbConstants()(gm)
    with torch.no_grad():
        assert_same_outputs(gm(X), net(X))


def test_what_operators_do_is_read_from_their_schemas() -> None:
    class Calls(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return (
                x + y, x.add_(y), torch.mul(x, 2, out=y), x.view(-1), x.clone(), x & y, y.size(0), x.T,
                torch._foreach_add_([x, y], 1.0),
            )  # fmt: skip

    gm, _, _ = trace_module(Calls())
    x, y, *nodes = list(gm.graph.nodes)[:-1]
    table = {node.name: (writes(gm, node), shares(gm, node)) for node in nodes}
    assert table["add"] == ([], [])
    assert table["add_"] == ([x], [x])
    assert table["mul"] == ([y], [y])
    assert table["view"] == ([], [x])
    assert table["clone"] == table["and_"] == table["size"] == ([], [])
    assert table["getattr_1"] == ([], [x])
    assert table["_foreach_add_"][0] == [x, y]
    assert {x, y} <= find_aliases(gm).pinned


def _clamped(m: Any, y: Tensor) -> Tensor:
    h = y.clamp(0)
    return m.conv(h.mul_(h.sigmoid()))


def _zeroed(activation: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def tail(m: Any, y: Tensor) -> Tensor:
        h = activation(y)
        h[:, 0] = 0.0
        return m.conv(h)

    return tail


TRAINABLE: dict[str, Callable[[Any, Tensor], Any]] = {
    "a clamp, overwritten as a whole": _clamped,
    "a clamp": _zeroed(lambda y: y.clamp_min(0)),
    "where": _zeroed(lambda y: torch.where(y > 0, y, 0.0)),
    "a sigmoid written out": _zeroed(lambda y: 1 - 1 / (1 + torch.exp(y)) - 0),
    "a tanh written out": _zeroed(lambda y: 2 * torch.sigmoid(2 * y) - 1),
}


@pytest.mark.parametrize("warm_start", ["auto", "none"])
@pytest.mark.parametrize("name", TRAINABLE)
def test_what_is_overwritten_is_not_needed_for_gradients(name: str, warm_start: str) -> None:
    """ReLU keeps its output for the gradient, a clamp its input."""
    net = randomize_batch_norms(Net(TRAINABLE[name])).double()
    net(X).sum().backward()
    converted = pn_compiler.transform(net, X, warm_start=warm_start)
    by_hand = copy.deepcopy(net)
    by_hand.bn = pn_compiler.transform(net, X, warm_start=warm_start, proxy=False).get_submodule("bn")
    plain = pn_compiler.transform(net, X, warm_start=warm_start, proxy=False)
    for model in (converted, plain, by_hand):
        model.zero_grad()
        model(X).square().sum().backward()
    assert_same_outputs(plain(X), by_hand(X), tolerance=1e-9)
    assert_same_outputs(plain.get_parameter("conv.weight").grad, by_hand.conv.weight.grad, tolerance=1e-9)


def test_a_write_that_nothing_sees_is_dead_code() -> None:
    def tail(m: Any, y: Tensor) -> Tensor:
        F.celu_(m.other(y))
        return m.conv(y)

    net = randomize_batch_norms(Net(tail)).double().eval()
    converted = pn_compiler.transform(net)
    assert "other" not in {node.target for node in converted.graph.nodes}


def test_sorting_a_tensor_is_no_write() -> None:
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values = x.sort(1)[0]
            return torch.cat([x.roll(1, 1), values], 1)

    x = torch.randn(2, 5)
    assert torch.equal(pn_compiler.transform(Sorts())(x), Sorts()(x))


class WritesData(nn.Module):
    """Overwrites, unnoticed by autograd, what the backward reads; nothing in the forward reads it again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Softsign()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        z = F.relu(self.act(y)) ** 2
        y.data.mul_(1.5)
        return z


def test_a_write_that_only_the_backward_sees_stays() -> None:
    torch.manual_seed(0)
    model = randomize_batch_norms(WritesData()).double().eval()
    converted = pn_compiler.transform(model, X, norm="rms", anchor=1.0).eval()  # exact
    gradients = []
    for network in (model, converted):
        network.zero_grad()
        network(X).sum().backward()
        gradients.append(network.get_parameter("conv.weight").grad)
    torch.testing.assert_close(*gradients)
