"""batch_norm as a function, in modules of one's own: found, and converted or refused; never left unsaid."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import RefusedError
from pn_compiler.testing import assert_batch_independent, assert_same_outputs, randomize_batch_norms
from tests.passes.norm_functions import Call, Norm, X, by_hand, functional, layers, left

ATEN = torch.ops.aten


def keywords(self: Norm, x: Tensor) -> Tensor:
    w, b, m, v = self.tensors
    return F.batch_norm(
        input=x, running_mean=m, running_var=v, weight=w, bias=b, eps=1e-3,
        training=self.training or not self.track_running_stats,
    )  # fmt: skip


CALLS: dict[str, Call] = {
    "F": functional,
    "F by keywords": keywords,
    "F, fixed mode": lambda s, x: F.batch_norm(x, *s.tensors[2:], *s.tensors[:2], False, 0.1, 1e-3),
    "torch": lambda s, x: torch.batch_norm(x, *s.tensors, s.training, 0.1, 1e-3, False),
    "native": lambda s, x: torch.native_batch_norm(x, *s.tensors, s.training, 0.1, 1e-3)[0],
    "legit": lambda s, x: torch._native_batch_norm_legit(x, *s.tensors, s.training, 0.1, 1e-3)[0],
    "aten native": lambda s, x: ATEN.native_batch_norm(x, *s.tensors, s.training, 0.1, 1e-3)[0],
    "aten legit": lambda s, x: ATEN._native_batch_norm_legit.default(x, *s.tensors, s.training, 0.1, 1e-3)[0],
    "aten no training": lambda s, x: ATEN._native_batch_norm_legit_no_training(x, *s.tensors, 0.1, 1e-3)[0],
    "instance_norm of running statistics": lambda s, x: F.instance_norm(
        x, *s.tensors[2:], *s.tensors[:2], False, 0.1, 1e-3
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("training", [False, True])
def test_calls_are_converted(how: str, training: bool) -> None:
    norm = Norm(CALLS[how])
    net = layers(norm).train(training)
    if not training:
        assert_same_outputs(net(X), by_hand(norm).eval()(X))  # they mean the same
    converted = pn_compiler.transform(net, strict=True)
    (site,) = pn_compiler.sites(converted)
    assert (site.name, site.kind, site.activation, site.warm_start) == ("1", "pn", "leakyrelu", True)
    assert {"1.weight", "1.bias"} <= dict(converted.named_parameters()).keys()
    assert not [name for name, _ in converted.named_buffers() if "running" in name]
    assert left(converted, X) == 0
    assert converted.training == training
    assert_same_outputs(converted(X), pn_compiler.transform(by_hand(norm).train(training))(X))
    assert_same_outputs(pn_compiler.fold(converted)(X), converted.eval()(X))
    assert_batch_independent(converted.train(), X)


@pytest.mark.parametrize(
    "names", [("gamma", "beta", "m", "v"), ("weight", "bias", "mean", "var"), ("a", "b", "c", "d")]
)
def test_names_do_not_matter(names: tuple[str, ...]) -> None:
    norm = Norm(functional, names)
    converted = pn_compiler.transform(layers(norm).eval(), strict=True)
    assert [s.name for s in pn_compiler.sites(converted)] == ["1"]
    assert_same_outputs(converted(X), pn_compiler.transform(by_hand(norm).eval())(X))
    assert not {f"1.{name}" for name in names[2:]} & converted.state_dict().keys()


class HoldsMore(Norm):
    """A child, and a parameter that is no operand of the norm."""

    def __init__(self) -> None:
        super().__init__(functional)
        self.act, self.scale = nn.LeakyReLU(), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.call[0](self, x)) * self.scale


class OnTheModel(Norm):
    """The model itself holds the parameters."""

    def __init__(self) -> None:
        super().__init__(functional)
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(self.conv(x)))


@pytest.mark.parametrize("kind", [HoldsMore, OnTheModel])
def test_owners_with_more_in_them_keep_that(kind: type[Norm]) -> None:
    norm = kind()
    net = norm.double() if kind is OnTheModel else layers(norm)
    plain = by_hand(norm)
    if kind is HoldsMore:
        plain[1].append(Times(2.0))  # type: ignore[operator, union-attr]
    converted = pn_compiler.transform(net.eval(), strict=True)
    (site,) = pn_compiler.sites(converted)
    assert site.name.endswith("norm")
    assert left(converted, X) == 0
    assert_same_outputs(converted(X), pn_compiler.transform(plain.eval())(X))
    names = converted.state_dict().keys()
    assert (kind is not HoldsMore) or "1.scale" in names
    assert not [name for name in names if "running" in name]
    assert len([name for name in names if name.endswith("norm.weight")]) == 1


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_one_module_called_twice() -> None:
    norm = Norm(functional, ("gamma", "beta", "m", "v"))
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)]
    hand = by_hand(norm)[1]
    net, plain = (nn.Sequential(convs[0], n, convs[1], n).double().eval() for n in (norm, hand))
    converted = pn_compiler.transform(net, strict=True)
    (site,) = pn_compiler.sites(converted)
    assert site.name == "1"
    assert_same_outputs(converted(X), pn_compiler.transform(plain)(X))


def without(*keys: str) -> Call:
    def call(self: Norm, x: Tensor) -> Tensor:
        w, b, m, v = self.tensors
        given = {"weight": w, "bias": b, "running_mean": m, "running_var": v} | dict.fromkeys(keys)
        return F.batch_norm(x, training=self.training or "running_mean" in keys, eps=1e-3, **given)

    return call


def test_half_an_affine_is_completed() -> None:
    for key, value in (("bias", 0.0), ("weight", 1.0)):
        norm = Norm(without(key))
        plain = by_hand(norm).eval()
        nn.init.constant_(getattr(plain[1][0], key), value)  # type: ignore[index, arg-type]
        converted = pn_compiler.transform(layers(norm).eval(), strict=True)
        assert_same_outputs(converted(X), pn_compiler.transform(plain)(X))


ALWAYS: dict[str, Call] = {
    "no statistics": without("running_mean", "running_var"),
    "fixed mode": lambda s, x: F.batch_norm(x, *s.tensors[2:], *s.tensors[:2], True, 0.1, 1e-3),
    "no_stats": lambda s, x: ATEN._native_batch_norm_legit.no_stats(x, *s.tensors[:2], True, 0.1, 1e-3)[0],
}


@pytest.mark.parametrize("how", ALWAYS)
def test_batch_statistics_in_eval_mode_are_no_running_statistics(how: str) -> None:
    net = layers(Norm(ALWAYS[how])).eval()
    before = copy.deepcopy(net)(X)
    converted = pn_compiler.transform(net)
    assert [(s.name, s.code) for s in pn_compiler.sites(converted)] == [("1", "PN104")]
    assert_same_outputs(converted(X), before)  # refused: it computes what it did
    untrained = pn_compiler.transform(net, warm_start="none", strict=True)
    assert left(untrained, X) == 0
    assert_batch_independent(untrained, X)


def shared_weight() -> nn.Module:
    one, two = Norm(functional), Norm(functional)
    two.weight = one.weight
    return nn.Sequential(layers(one), nn.Conv2d(2, 8, 1).double(), two)


def across() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Norm(functional), Norm(functional)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([x, x, x[:, :2]], 1)
            w, b, _, v = self.one.tensors
            return F.batch_norm(x, self.two.running_mean, v, w, b)

    return Net()


def saved(self: Norm, x: Tensor) -> Tensor:
    y, mean, _ = torch.native_batch_norm(x, *self.tensors, False, 0.1, 1e-3)
    return y + mean.sum()


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "abs": lambda: layers(
        Norm(lambda s, x: F.batch_norm(x, *s.tensors[2:], s.weight.abs() + 1e-5, s.bias, s.training))
    ),
    "weight read elsewhere": lambda: layers(Norm(lambda s, x: functional(s, x) * s.weight.sum())),
    "saved statistics": lambda: layers(Norm(saved)),
    "two owners": across,
    "shared weight": shared_weight,
    "computed momentum": lambda: layers(
        Norm(lambda s, x: F.batch_norm(x, *s.tensors[2:], *s.tensors[:2], s.training, 1 / x.size(0)))
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_other_operands_are_refused_by_code(how: str) -> None:
    net = REFUSED[how]().eval()
    before = net(X)
    converted = pn_compiler.transform(net, X)
    assert "PN106" in {site.code for site in pn_compiler.sites(converted)}
    assert left(converted, X) > 0
    assert_same_outputs(converted(X), before)
    with pytest.raises(RefusedError, match="PN106"):
        pn_compiler.transform(net, X, strict=True)


class Standardized(nn.Conv2d):
    """Weight standardization, as in timm: no sample is tied to another."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


def test_standardized_weights_are_no_site() -> None:
    net = nn.Sequential(Standardized(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    converted = pn_compiler.transform(net, X, strict=True)
    assert [site.name for site in pn_compiler.sites(converted)] == ["1"]


def test_instance_norm_is_none() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.instance_norm(x)

    assert pn_compiler.sites(pn_compiler.transform(Net(), strict=True)) == ()
    norm = nn.InstanceNorm2d(3, track_running_stats=True)
    assert pn_compiler.sites(pn_compiler.transform(nn.Sequential(norm).eval(), strict=True)) == ()


class Unread(nn.Module):
    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.write = Norm(functional), write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.norm(x))
        return x * 2


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda y: None,
    "activation": F.celu_,
    "view": lambda y: y.select(1, 2).fill_(0.25),
    "activation and view": lambda y: y.clamp_(min=0).select(1, 2).fill_(0.25),
}


@pytest.mark.parametrize("how", WRITES)
def test_calls_that_nothing_reads_are_reported(how: str) -> None:
    x = torch.randn(2, 8, 4, 4).double()
    converted = pn_compiler.transform(Unread(WRITES[how]).double().eval(), x)
    assert [(s.name, s.code) for s in pn_compiler.sites(converted)] == [("norm", "PN102")]


class Ranks(nn.Module):
    """One BatchNorm1d as a function, on inputs of two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        for y in (x, x[..., None]):
            norm = self.bn
            x = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return x


def test_calls_on_inputs_of_several_ranks_share_a_normalizer() -> None:
    torch.manual_seed(0)
    model = randomize_batch_norms(Ranks()).double().eval()
    x = torch.randn(3, 4, 10, dtype=torch.float64)
    converted = pn_compiler.transform(model, x, norm="rms", anchor=1.0, strict=True)  # exact
    assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]
    torch.testing.assert_close(converted.eval()(x), model(x))
