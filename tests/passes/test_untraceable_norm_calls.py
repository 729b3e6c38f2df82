"""batch_norm as a function in code that cannot be traced: converted where it can be, else reported."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import RefusedError
from pn_compiler.testing import assert_same_outputs
from tests.passes.norm_functions import Norm, X, by_hand, functional, layers, left


class Opaque(nn.Module):
    """Branches on values."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() < 1e9 else x


class OpaqueNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


def helper(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True) if x.sum() < 1e9 else x


class UsesHelper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return helper(x)


class InTrainingOnly(Norm):
    """The eval branch is written out."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return functional(self, x)
        w, b, m, v = (t[:, None, None] for t in self.tensors)
        return (x - m) / (v + 1e-3).sqrt() * w + b


def test_norms_below_untraceable_code_are_converted() -> None:
    norm = Norm(functional)
    net = Opaque(layers(norm)).eval()
    converted = pn_compiler.transform(net, X, strict=True)
    assert [(s.name, s.kind) for s in pn_compiler.sites(converted)] == [("inner.1", "pn")]
    assert left(converted, X) == 0
    assert_same_outputs(converted(X), pn_compiler.transform(by_hand(norm).eval())(X))
    alone = nn.Sequential(nn.Conv2d(3, 8, 3).double(), Opaque(Norm(functional)))
    assert left(pn_compiler.transform(alone.eval(), X, strict=True), X) == 0


@pytest.mark.parametrize(
    ("norm", "code"),
    [(OpaqueNorm(functional), "PN120"), (UsesHelper(), "PN120"), (InTrainingOnly(functional), "PN121")],
)
@pytest.mark.parametrize("beside", [False, True])
def test_norms_in_untraceable_code_are_reported(norm: nn.Module, code: str, beside: bool) -> None:
    net = layers(copy.deepcopy(norm)).eval()
    if beside:
        net.append(nn.BatchNorm2d(2).double())
    before = net(X)
    converted = pn_compiler.transform(net, X)
    sites = {site.name: site.code for site in pn_compiler.sites(converted)}
    assert sites["1"] == code
    assert list(sites) == ["1", "3"][: 1 + beside]
    assert beside or torch.equal(converted(X), before)
    with pytest.raises(RefusedError, match=code):
        pn_compiler.transform(net, X, strict=True)


def test_the_model_itself_can_be_untraceable() -> None:
    converted = pn_compiler.transform(OpaqueNorm(functional))
    assert [(s.name, s.code) for s in pn_compiler.sites(converted)] == [("the model", "PN120")]
    whole = pn_compiler.transform(layers(Norm(functional)), leaves=[Norm])
    assert [(s.name, s.code) for s in pn_compiler.sites(whole)] == [("1", "PN120")]


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


def test_wrapped_functions_are_reported() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Function.apply(x) * 2

    converted = pn_compiler.transform(nn.Sequential(Net(), nn.Conv2d(3, 2, 1)))
    assert {site.code for site in pn_compiler.sites(converted)} & {"PN106", "PN120", "PN121"}
