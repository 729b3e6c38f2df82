"""batch_norm as a function in code that stays whole: converted where it is safe, else named."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two BatchNorms behind something that no graph can hold."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(3)
        self.before = before


class Direct(Two):
    """Calls batch_norm with the tensors of one of them, under another name."""

    def forward(self, x: Any) -> Any:
        x = self.conv(self.other(self.before(x)))
        bn = self.bn
        return F.relu(
            F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps)
        )


class Named(Two):
    """Calls batch_norm with the tensors of one of them."""

    def forward(self, x: Any) -> Any:
        x = self.conv(self.other(self.before(x)))
        y = F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        return F.relu(y)


def _under_no_grad(x: Any) -> Any:
    with torch.no_grad():
        return x * 2


def _on_a_value(x: Any) -> Any:
    return -x if x.sum() > 1e9 else x


def _written(x: Any) -> Any:
    y = x.clone()
    y.data = y.data * 2
    return y


@pytest.mark.parametrize("before", [_under_no_grad, _on_a_value, _written])
@pytest.mark.parametrize("nested", [False, True])
def test_each_is_named_with_what_to_do(before: Callable[[Any], Any], nested: bool) -> None:
    net: nn.Module = Named(before)
    net = randomize_batch_norms(nn.Sequential(net, nn.ReLU()) if nested else net).eval()
    converted = pn_compiler.transform(net, IMAGES)
    path = "0." * nested
    left, done = pn_compiler.sites(converted)[0], pn_compiler.sites(converted)[1]
    assert (left.name, left.kind, left.code) == (f"{path}bn", "skipped", "PN101")
    assert "self.bn(x)" in left.reason
    assert (done.name, done.kind) == (f"{path}other", "norm_only")


def test_a_local_name_for_the_norm_is_named_too() -> None:
    net = randomize_batch_norms(Direct(_on_a_value)).eval()
    assert [(site.name, site.code) for site in pn_compiler.sites(pn_compiler.transform(net, IMAGES))] == [
        ("bn", "PN101"),
        ("other", "PN101"),
    ]


class Functional(nn.Module):
    """In-place ABN: batch_norm on tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return F.leaky_relu(y, 0.01)


class Around(nn.Module):
    """Names a parameter and has operators in place: weights of its children absorb nothing."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))
        self.abn, self.out = Functional(), nn.Conv2d(4, 2, 1)
        self.before = before

    def forward(self, x: Any) -> Any:
        y = self.before(x) * 1
        y.mul_(2)
        return self.out(self.abn(F.conv2d(y, self.weight)))


@pytest.mark.parametrize("before", [_under_no_grad, _on_a_value])
def test_a_module_that_only_normalizes_is_converted_where_weights_may_be_written(
    before: Callable[[Any], Any],
) -> None:
    torch.manual_seed(0)
    net = Around(before).eval()
    with torch.no_grad():
        net.abn.running_mean.normal_()
        net.abn.running_var.uniform_(0.5, 2)
        net.abn.weight.uniform_(0.5, 2)
        net.abn.bias.normal_()
    converted = pn_compiler.transform(net, IMAGES, proxy=False, strict=True)
    assert type(converted) is Around
    assert isinstance(converted.abn, fx.GraphModule)
    (site,) = pn_compiler.sites(converted)
    assert site.activation == "leakyrelu"
    by_hand = copy.deepcopy(net)
    normalizer = nn.GroupNorm(1, 4)  # the conversion by the formula of docs/method.md is tested elsewhere
    normalizer.load_state_dict(converted.get_submodule(site.name).state_dict())
    by_hand.abn = nn.Sequential(normalizer, nn.LeakyReLU(0.01))
    assert_same_outputs(converted(IMAGES), by_hand(IMAGES))
    assert torch.equal(converted.weight, net.weight)
