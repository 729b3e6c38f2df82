"""Views and dropouts between a BatchNorm and its activation."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms


def chain(*between: nn.Module, tail: nn.Module) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *between, tail)
    return randomize_batch_norms(net).eval()


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

CONVERTED = {
    "flatten": chain(nn.Flatten(), nn.SiLU(), tail=nn.Linear(64, 2)),
    "dropout": chain(nn.Dropout(0.5), nn.ReLU(), tail=nn.Conv2d(4, 2, 1)),
    "dropout2d, leaky": chain(nn.Dropout2d(0.5), nn.LeakyReLU(), tail=nn.Conv2d(4, 2, 1)),
    "dropout, flatten": chain(nn.Dropout(0.5), nn.Flatten(), nn.ReLU(), tail=nn.Linear(64, 2)),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_the_activation_is_found(name: str) -> None:
    net = CONVERTED[name]
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert site.kind == "pn"
    assert_same_outputs(converted(X), pn_compiler.transform(net, proxy=False)(X))


def test_dropout_and_relu_commute_in_train_mode() -> None:
    net = CONVERTED["dropout"]
    hoisted = pn_compiler.transform(net, proxy=False).train()
    torch.manual_seed(1)
    actual = hoisted(X)
    torch.manual_seed(1)
    normalized = hoisted.get_submodule("1")(net[0](X))  # type: ignore[index]
    assert_same_outputs(actual, net[4](F.relu(F.dropout(normalized, 0.5))))  # type: ignore[index]


@pytest.mark.parametrize(
    "move", [lambda y: F.pixel_shuffle(y, 2), nn.PixelUnshuffle(2), lambda y: y.moveaxis(2, 3)]
)
def test_it_crosses_what_only_moves_values(move: Callable[[Tensor], Tensor]) -> None:
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.move = move

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.move(self.bn(self.conv(x))))

    net = Moves().eval()
    converted = pn_compiler.transform(net, warm_start="none")
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    assert_same_outputs(converted(X), move(converted.get_submodule("bn")(net.conv(X))))


def test_it_does_not_cross_a_view_with_a_forward_of_its_own() -> None:
    class Negated(nn.Flatten):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 1e9 else -super().forward(x)

    net = chain(Negated(), nn.ReLU(), tail=nn.Linear(64, 2))
    converted = pn_compiler.transform(net, X)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]
    assert_same_outputs(converted(X), pn_compiler.transform(net, X, proxy=False)(X))


def test_dropout_before_a_smooth_activation_stays() -> None:
    converted = pn_compiler.transform(chain(nn.Dropout(0.5), nn.SiLU(), tail=nn.Conv2d(4, 2, 1)))
    assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]


def test_a_slope_per_channel_does_not_cross_a_view() -> None:
    net = chain(nn.Flatten(), nn.PReLU(64), tail=nn.Linear(64, 2))
    converted = pn_compiler.transform(net)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]
    assert converted(X).shape == (2, 2)


def test_from_scratch_views_are_crossed_whatever_follows() -> None:
    class Tokens(nn.Module):
        """BatchNorm1d over [N, C, L] in a network of [N, L, C]."""

        def __init__(self) -> None:
            super().__init__()
            self.bn, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(F.gelu(self.bn(x.transpose(1, 2)).transpose(1, 2)))

    x = torch.randn(2, 5, 4)
    net = Tokens()
    converted = pn_compiler.transform(net, x, warm_start="none")
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    z = converted.get_submodule("bn")(x.transpose(1, 2))
    assert_same_outputs(converted(x), net.linear(z.transpose(1, 2)))


def test_reading_a_shape_is_no_reading_of_values() -> None:
    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.linear = nn.BatchNorm2d(3), nn.Linear(48, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            y = self.bn(x)
            batch, _, height, _ = y.shape
            z = F.relu(y)
            return self.linear(z.view(z.size(0), -1)).view(batch, -1), height

    net = randomize_batch_norms(Shapes()).eval()
    converted = pn_compiler.transform(net)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    assert_same_outputs(converted(X)[0], pn_compiler.transform(net, proxy=False)(X)[0])
    assert converted(X)[1] == 4


def test_a_dropout_in_place_stays_before_its_activation() -> None:
    """Behind a relu it would overwrite what the gradient of the relu needs."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(inplace=True), nn.ReLU())
    converted = pn_compiler.transform(net.train(), torch.randn(3, 4))
    converted(torch.randn(3, 4)).sum().backward()
    assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]
