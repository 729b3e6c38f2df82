"""Where the scale and shift of a site may go: what commutes with them, by rank, and what blocks them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.nn import ProxyNormAct
from pn_compiler.passes.absorption import Router, commutes
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests.passes.graphs import readers


class Readers(nn.Module):
    """Everything reads one value of 6 channels, [N, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(6)
        self.two, self.three, self.drop = nn.MaxPool2d(2), nn.AvgPool3d(2), nn.Dropout2d()
        self.conv, self.sample = nn.Conv2d(6, 2, 1), nn.Conv3d(6, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        return (
            self.two(y), F.avg_pool2d(y, 2), F.adaptive_avg_pool2d(y, 1), self.drop(y), y.flatten(1),
            y.view(y.size(0), -1), y.mean((2, 3)), y.contiguous(),
            self.three(y), F.max_pool3d(y, 2), F.adaptive_avg_pool3d(y, 2), F.max_pool1d(y, 2),
            F.max_pool2d(y, 2, 1, 0, 1, False, True), F.max_pool2d(y, 2, return_indices=True), y.flatten(2),
            y.view(y.flatten(0, 1).size(0), -1), y.mean(1), y.softmax(1),
        ), self.conv(y), self.sample(y)  # fmt: skip


def test_a_pool_commutes_if_it_pools_pixels_only() -> None:
    gm, value, (results, conv, sample) = readers(Readers())
    found = [commutes(gm, reader, value, through_padding=True) for reader in results]
    assert found == [True] * 8 + [False] * 10
    router = Router(gm, through_padding=True)
    assert router.refusal(conv, value, 6) is None
    assert "for one sample" in (router.refusal(sample, value, 6) or "")


def test_nothing_is_known_of_an_input_of_unknown_rank() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.pool = nn.BatchNorm1d(6), nn.MaxPool1d(2)

        def forward(self, x: Tensor) -> Any:
            y = self.bn(x)
            return self.pool(y), F.avg_pool1d(y, 2)

    gm, value, results = readers(Unknown())
    assert not any(commutes(gm, reader, value, through_padding=True) for reader in results)


def test_a_value_that_a_view_shows_overwritten_blocks_all_its_readers() -> None:
    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.bn(x)
            y[:, :2].mul_(2.0)
            return self.conv(y), y.size(0)

    gm, value, _ = readers(Overwritten())
    route = Router(gm, through_padding=True).route(value, 6)
    assert not route.absorbers
    assert len(route.blocked) == 2  # the slice and the convolution, not the shape
    assert all("overwritten" in blocked.reason for blocked in route.blocked)


class Squared(nn.Dropout):
    """A class of torch.nn with another forward, which cannot be traced into."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else x * x


class Peak(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else super().forward(x) ** 2


class Reversed(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else x.flip(1)


class Turned(nn.Flatten):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else super().forward(x).flip(1)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda m, args, result: result * result)
    return module


def net(forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> nn.Module:
    """A model with these parts, and an activation."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            for name, part in parts.items():
                setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return Net()


def images(layer: nn.Module, reader: nn.Module | None = None) -> tuple[nn.Module, Tensor]:
    """`layer` between a site and what reads it."""
    model = net(
        lambda m, x: m.reader(m.layer(m.act(m.bn(m.conv(x))))),
        conv=nn.Conv2d(3, 6, 1), bn=nn.BatchNorm2d(6), layer=layer, reader=reader or nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    return model, torch.randn(2, 3, 4, 4)


def sequences(
    before: Callable[[Any, Tensor], Tensor], length: int = 6, **parts: Any
) -> tuple[nn.Module, Tensor]:
    """A site over [N, 6, 6], whose rank `before` decides on, and a linear layer over 6 steps."""
    model = net(
        lambda m, x: m.reader(m.act(m.bn(before(m, x)))),
        bn=nn.BatchNorm1d(6), reader=nn.Linear(6, 2), **parts,
    )  # fmt: skip
    return model, torch.randn(2, 3, length)


def viewed(
    before: Callable[[Any, Tensor], Tensor], x: Tensor, features: int, channels: int, **parts: Any
) -> tuple[nn.Module, Tensor]:
    """A site whose first axis is not that of x, and a view that has that of x."""
    model = net(
        lambda m, x: m.reader(m.act(m.bn(before(m, x))).view(x.size(0), -1)),
        bn=nn.BatchNorm1d(channels), reader=nn.Linear(features, 2), **parts,
    )  # fmt: skip
    return model, x


CONV = nn.Conv1d(3, 6, 1)
CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "a dropout of another forward": lambda: images(Squared()),
    "a pool of another forward": lambda: images(Peak(2)),
    "an identity of another forward": lambda: images(Reversed()),
    "a flatten of another forward": lambda: images(Turned(), nn.Linear(96, 2)),
    "a pool with a hook": lambda: images(hooked(nn.MaxPool2d(2))),
    "a dropout with a hook": lambda: images(hooked(nn.Dropout())),
    "a flatten with a hook": lambda: images(hooked(nn.Flatten()), nn.Linear(96, 2)),
    "an average over an empty list of axes": lambda: (
        net(
            lambda m, x: m.reader(y := m.act(m.bn(m.conv(x)))) + y.mean((), keepdim=True),
            conv=nn.Conv2d(3, 6, 1), bn=nn.BatchNorm2d(6), reader=nn.Conv2d(6, 6, 1),
        ),
        torch.randn(2, 3, 4, 4),
    ),
    "a pool that gives indices": lambda: sequences(
        lambda m, x: m.pool(m.conv(x))[0], 12, conv=CONV, pool=nn.MaxPool1d(2, return_indices=True)
    ),
    "a function that gives indices": lambda: sequences(
        lambda m, x: torch.adaptive_max_pool1d(m.conv(x), 6)[0], 12, conv=CONV
    ),
    "some of the pieces": lambda: sequences(
        lambda m, x: m.conv(x).chunk(4, 1)[1:][0], conv=nn.Conv1d(3, 24, 1)
    ),
    "pieces through an identity": lambda: sequences(
        lambda m, x: m.same(m.conv(x).chunk(4, 1))[0], conv=nn.Conv1d(3, 24, 1), same=nn.Identity()
    ),
    "the weight first": lambda: sequences(
        lambda m, x: F.linear(weight=m.weight, input=m.conv(x)), conv=CONV, weight=torch.randn(6, 6)
    ),
    "an index of True": lambda: sequences(lambda m, x: m.conv(x)[True][0], conv=CONV),
    "padded samples": lambda: viewed(
        lambda m, x: m.conv(F.pad(x, (0, 0, 0, 0, 1, 1))), torch.randn(2, 3, 6), 72, 6, conv=CONV
    ),
    "samples padded by a layer": lambda: viewed(
        lambda m, x: m.pad(x), torch.randn(3, 4, 5), 40, 4, pad=nn.ConstantPad3d((0, 0, 0, 0, 1, 2), 0.0)
    ),
    "a parameter with samples": lambda: viewed(
        lambda m, x: m.conv(x + m.table), torch.randn(1, 3, 6), 72, 6, conv=CONV, table=torch.randn(2, 3, 6)
    ),
    "pixels shuffled from samples": lambda: viewed(
        lambda m, x: m.shuffle(x), torch.randn(8, 3, 4), 12, 6, shuffle=nn.PixelShuffle(2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_is_not_certain_to_commute_gets_the_full_value(case: str, with_example: bool) -> None:
    torch.manual_seed(0)
    model, x = CASES[case]()
    model, x = randomize_batch_norms(model).double().eval(), x.double()
    options = {"warm_start": "none", "proxy_padding": "output"}
    converted = pn_compiler.transform(model, x if with_example else None, **options)  # type: ignore[arg-type]
    by_hand = copy.deepcopy(model)
    site = copy.deepcopy(converted.get_submodule("bn"))
    if isinstance(site, ProxyNormAct):
        site.outputs = ("output",)
        by_hand.act = nn.Identity()
    by_hand.bn = site
    with torch.no_grad():
        assert_same_outputs(converted(x), by_hand(x), tolerance=1e-9)
        assert_same_outputs(pn_compiler.fold(converted)(x), by_hand(x), tolerance=1e-7)
