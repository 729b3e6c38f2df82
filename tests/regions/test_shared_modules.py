"""Modules and weights that several parts of a model share, where it cannot be traced as a whole."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.testing import assert_same_outputs, count_modules, randomize_batch_norms

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
SHARED_ACT = nn.SiLU()


class ConvBlock(nn.Module):
    """As in YOLO: one activation, and other modules without parameters, for all blocks."""

    def __init__(self, channels: int, drop: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8), SHARED_ACT
        self.rest = nn.Sequential(drop, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.act(self.bn(self.conv(x))))


class Depends(nn.Module):
    def __init__(self, one: nn.Module, two: nn.Module) -> None:
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x) if x.mean() < 1e9 else x


def test_modules_without_parameters_may_be_shared() -> None:
    drop = nn.Dropout(0.5)
    net = randomize_batch_norms(Depends(ConvBlock(4, drop), ConvBlock(8, drop))).eval()
    converted = pn_compiler.transform(net, IMAGES, strict=True)
    assert [site.name for site in pn_compiler.sites(converted)] == ["one.bn", "two.bn"]
    assert all(site.activation == "silu" for site in pn_compiler.sites(converted))
    straight = nn.Sequential(net.one, net.two)  # one graph
    assert_same_outputs(
        converted(IMAGES),
        pn_compiler.transform(straight, proxy=False, warm_start="auto")(IMAGES),
        tolerance=1e-5,
    )
    assert isinstance(SHARED_ACT, nn.SiLU)
    assert not SHARED_ACT.inplace


@pytest.mark.parametrize("affine", [False, True])
def test_a_shared_batch_norm_is_refused(affine: bool) -> None:
    shared = nn.BatchNorm2d(8, affine=affine)
    one = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), shared)
    two = nn.Sequential(shared, nn.BatchNorm2d(8))
    converted = pn_compiler.transform(Depends(one, two).eval(), IMAGES)
    codes = {site.name: site.code for site in pn_compiler.sites(converted)}
    assert codes.pop("one.3") == "PN101"
    assert "PN101" not in codes.values()
    assert count_modules(converted, nn.BatchNorm2d) == 1


def tied(tie: str) -> Depends:
    """A convolution that both blocks have, right behind a site that would change its weight."""
    torch.manual_seed(0)
    shared = nn.Conv2d(8, 8, 1)
    other = nn.Conv2d(8, 8, 1)
    other.weight, other.bias = shared.weight, shared.bias
    one = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), shared, nn.BatchNorm2d(8))
    two = nn.Sequential(
        shared if tie == "module" else other, nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 2, 1)
    )
    return randomize_batch_norms(Depends(one, two)).eval()  # type: ignore[return-value]


@pytest.mark.parametrize("tie", ["module", "parameter"])
def test_a_shared_weight_is_left_alone_and_its_batch_norms_convert(tie: str) -> None:
    net = tied(tie)
    converted = pn_compiler.transform(net, IMAGES, strict=True)
    assert {site.name for site in pn_compiler.sites(converted)} == {"one.1", "one.4", "two.1"}
    assert count_modules(converted, nn.BatchNorm2d) == 0
    state = converted.state_dict()
    for name in ("one.3", "two.0"):
        for key in ("weight", "bias"):
            assert torch.equal(state[f"{name}.{key}"], net.one[3].get_parameter(key))  # type: ignore[operator, index]
    by_hand = copy.deepcopy(net)
    for name in ("one.1", "one.4", "two.1"):
        by_hand.set_submodule(name, converted.get_submodule(name))
    assert_same_outputs(converted(IMAGES), by_hand(IMAGES))


class GhostBatchNorm(nn.Module):
    """As in TabNet: normalizes pieces of the batch."""

    def __init__(self, features: int, size: int = 2) -> None:
        super().__init__()
        self.size, self.bn = size, nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.chunk(math.ceil(x.shape[0] / self.size), 0)
        return torch.cat([self.bn(piece) for piece in pieces], 0)


class Gated(nn.Module):
    """A GLU_Layer, whose linear layer may belong to others as well."""

    def __init__(self, features: int, out: int, fc: nn.Linear | None = None) -> None:
        super().__init__()
        self.out, self.bn = out, GhostBatchNorm(2 * out)
        self.fc = fc if fc is not None else nn.Linear(features, 2 * out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.fc(x))
        return x[:, : self.out] * torch.sigmoid(x[:, self.out :])


class Features(nn.Module):
    """A FeatTransformer: shared and own layers, added up."""

    def __init__(self, shared: list[nn.Linear], out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([*(Gated(0, out, fc) for fc in shared), Gated(out, out)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in list(self.layers)[1:]:
            x = (x + layer(x)) * 0.5**0.5
        return x


class TabNet(nn.Module):
    def __init__(self, depends: bool) -> None:
        super().__init__()
        shared = [nn.Linear(6, 8, bias=False), nn.Linear(4, 8, bias=False)]
        self.first, self.steps = nn.BatchNorm1d(6), nn.ModuleList(Features(shared, 4) for _ in range(3))
        self.head, self.depends = nn.Linear(4, 2), depends

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        total = x.new_zeros(1)
        for step in self.steps:
            if not self.depends or x.sum() < 1e9:
                total = total + F.relu(step(x))
        return self.head(total)


@pytest.mark.parametrize("depends", [False, True])
@pytest.mark.parametrize("inputs", [False, True])
def test_tabnet_shares_its_linear_layers(depends: bool, inputs: bool) -> None:
    torch.manual_seed(0)
    net = randomize_batch_norms(TabNet(depends)).eval()
    x = torch.randn(5, 6)
    converted = pn_compiler.transform(net, x if inputs else None, strict=True)
    assert len(pn_compiler.sites(converted)) == 10
    assert count_modules(converted, nn.BatchNorm1d) == 0
    for name, parameter in converted.named_parameters():
        if ".fc." in name:
            assert torch.equal(parameter, net.get_parameter(name))
    by_hand = copy.deepcopy(net)
    for site in pn_compiler.sites(converted):
        by_hand.set_submodule(site.name, converted.get_submodule(site.name))
    assert_same_outputs(converted(x), by_hand(x))
    for index in range(5):  # the pieces of a batch no longer matter
        assert_same_outputs(converted(x)[index : index + 1], converted(x[index : index + 1]))


class TwoNames(nn.Module):
    """Calls its BatchNorm in a part that cannot be traced, and before that if `also_before`."""

    class Part(nn.Module):
        def __init__(self, bn: nn.Module) -> None:
            super().__init__()
            self.bn = bn

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) if x.mean() < 1e9 else x

    def __init__(self, also_before: bool) -> None:
        super().__init__()
        self.bn, self.also_before = nn.BatchNorm2d(4), also_before
        self.part = self.Part(self.bn)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(torch.relu(self.bn(x)) if self.also_before else x)


@pytest.mark.parametrize("also_before", [False, True])
def test_a_batch_norm_that_untraceable_code_calls_too_stays_under_both_names(also_before: bool) -> None:
    converted = pn_compiler.transform(randomize_batch_norms(TwoNames(also_before)).eval(), IMAGES)
    (site,) = pn_compiler.sites(converted)
    assert (site.name, site.kind, site.code) == ("bn", "skipped", "PN101")
    kinds = {type(m) for n, m in converted.named_modules(remove_duplicate=False) if n.endswith("bn")}
    assert kinds == {nn.BatchNorm2d}
