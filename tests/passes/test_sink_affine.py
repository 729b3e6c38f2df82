"""Scale and shift through branches: where they go, where they stay, and that outputs do not change."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.graph.pass_base import run_pipeline
from pn_compiler.nn import ConstantAffine, ConstantClamp, ProxyNormAct
from pn_compiler.passes.fold.sink_affine import SinkAffine
from pn_compiler.passes.fold.unshare_statistics import UnshareStatistics
from pn_compiler.passes.route_affine import RouteAffine
from pn_compiler.testing import randomize_batch_norms
from tests.passes.graphs import run, traced

TOLERANCE = 1e-6  # in float64: fold and forward evaluate the moments of SiLU in two ways, 1e-8 apart
IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two sites of 8 channels, a function of them, and what reads that."""

    def __init__(self, join: Callable[..., Tensor], reader: nn.Module, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), act())
        self.two = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act())
        self.three = nn.Conv2d(3, 3, 1)  # no site
        self.join, self.reader = join, reader

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.join(self.one(x), self.two(x), self.three(x)))


def converted(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = pn_compiler.transform(randomize_batch_norms(net), IMAGES, warm_start="none")
    for name, parameter in model.named_parameters():  # every channel has moments of its own
        if name.endswith(("weight", "bias")):
            nn.init.normal_(parameter, 0.3, 0.2)
    return model.eval()


def remaining(model: nn.Module) -> int:
    return sum(isinstance(module, ConstantAffine | ConstantClamp) for module in model.modules())


def check(model: nn.Module, count: int) -> None:
    """The folded `model` applies `count` affines on their own, and computes the same; in float64."""
    model, images = model.double(), IMAGES.double()
    folded = pn_compiler.fold(model)
    assert remaining(folded) == count
    assert not any(isinstance(module, ProxyNormAct) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), rtol=TOLERANCE, atol=TOLERANCE)
        third = images[:1] * 0.5  # by itself: no sample depends on its batch
        torch.testing.assert_close(
            folded(torch.cat([images, third]))[2:], folded(third), rtol=TOLERANCE, atol=TOLERANCE
        )


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


PASSES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "cat with a square": (lambda a, b, x: torch.cat([a, b, x.square()], 1), 19),
    "cat": (lambda a, b, x: torch.cat([a, b], 1), 16),
    "cat with others": (lambda a, b, x: torch.cat([a, F.max_pool2d(x, 3, 1, 1), b], dim=1), 19),
    "cat, then pool": (lambda a, b, x: F.max_pool2d(torch.cat([a, b], 1), 3, 2, 1), 16),
    "chunk": (lambda a, b, x: torch.cat([b, torch.cat([a, b], 1).chunk(2, dim=1)[1]], 1), 16),
    "split": (lambda a, b, x: torch.cat([torch.split(a, [3, 5], dim=1)[1], b], 1), 13),
    "slice": (lambda a, b, x: torch.cat([a[:, :5], b[:, 5:, :, :]], 1), 8),
    "shuffle": (lambda a, b, x: shuffle(torch.cat([a, b], 1), 4), 16),
    "nearest": (lambda a, b, x: F.interpolate(torch.cat([a, b], 1), scale_factor=2, mode="nearest"), 16),
    "bilinear": (lambda a, b, x: F.interpolate(a, size=(5, 7), mode="bilinear"), 8),
    "reflect": (lambda a, b, x: F.pad(torch.cat([a, b], 1), (1, 2, 3, 0), mode="reflect"), 16),
    "replicate": (lambda a, b, x: F.pad(a, (1, 1, 0, 0), mode="replicate"), 8),
}  # fmt: skip


TRANSPOSED: dict[str, tuple[Callable[..., Tensor], nn.Module]] = {
    "pixels": (lambda a, b, x: torch.cat([a, b], 1)[:, :, 1:].transpose(2, 3), nn.Conv2d(16, 4, 1)),
    "tokens": (lambda a, b, x: torch.cat([a, b], 1).flatten(2).transpose(1, 2), nn.Linear(16, 4)),
    "rows of pixels": (
        lambda a, b, x: torch.cat([a, b], 1),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(16, 4, 1)),
    ),
    "channels last": (lambda a, b, x: a.permute(0, 2, 3, 1).contiguous(), nn.Linear(8, 4)),
    "there and back": (lambda a, b, x: a.permute(0, 2, 3, 1).permute(0, 3, 1, 2), nn.Conv2d(8, 4, 1)),
    "by steps": (lambda a, b, x: a.transpose(1, 2).transpose(2, 3), nn.Linear(8, 4)),
    "dropout": (lambda a, b, x: a.permute((0, 2, 3, 1)), nn.Sequential(nn.Dropout(), nn.Linear(8, 4))),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transpositions_commute(name: str) -> None:
    join, reader = TRANSPOSED[name]
    check(converted(Net(join, reader, nn.SiLU)), 0)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("name", PASSES)
def test_what_commutes(name: str, act: Callable[[], nn.Module]) -> None:
    join, channels = PASSES[name]
    check(converted(Net(join, nn.Conv2d(channels, 4, 1), act)), 0)


def test_a_sum_of_shifts() -> None:
    """A ReLU's scale is in its normalizer: two sums of shifts can be added, and one to anything."""
    check(converted(Net(lambda a, b, x: a + b, nn.Conv2d(8, 4, 1), nn.ReLU)), 0)
    check(converted(Net(lambda a, b, x: a + x.mean(1, keepdim=True), nn.Conv2d(8, 4, 1), nn.ReLU)), 0)


@pytest.mark.parametrize(
    "reader",
    [nn.Conv2d(16, 8, 3, stride=2), nn.Conv2d(16, 16, (3, 1), groups=16), nn.Conv2d(16, 8, 1, groups=4)],
)
def test_what_takes_in(reader: nn.Module) -> None:
    check(converted(Net(lambda a, b, x: torch.cat([a, b], 1), reader, nn.GELU)), 0)


def test_a_linear_layer_behind_the_branches() -> None:
    reader = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5))
    check(converted(Net(lambda a, b, x: torch.cat([a, b], 1), reader, nn.SiLU)), 0)


STAYS: dict[str, tuple[Callable[..., Tensor], nn.Module]] = {
    "zeros around": (lambda a, b, x: torch.cat([a, b], 1), nn.Conv2d(16, 4, 3, padding=1)),
    "an activation": (lambda a, b, x: torch.cat([a, b], 1), nn.Sequential(nn.Sigmoid(), nn.Conv2d(16, 4, 1))),
    "zero pad": (lambda a, b, x: F.pad(torch.cat([a, b], 1), (1, 1)), nn.Conv2d(16, 4, 1)),
    "a product": (lambda a, b, x: a * b, nn.Conv2d(8, 4, 1)),
    "another scale": (lambda a, b, x: a + b, nn.Conv2d(8, 4, 1)),
    "rows": (lambda a, b, x: torch.cat([a, b], 2), nn.Conv2d(8, 4, 1)),
    "a row": (lambda a, b, x: torch.cat([a, b], 1)[:, :, :, 1], nn.Conv1d(16, 4, 1)),
    "channels last, a convolution": (
        lambda a, b, x: torch.cat([a, b], 1).permute(0, 2, 3, 1),
        nn.Conv2d(9, 4, 1),
    ),
    "channels last, an activation": (
        lambda a, b, x: torch.cat([a, b], 1).permute(0, 2, 3, 1),
        nn.Sequential(nn.Sigmoid(), nn.Linear(16, 4)),
    ),
    "a linear layer over pixels": (lambda a, b, x: torch.cat([a, b], 1), nn.Linear(9, 4)),
    "channels last, a sum": (
        lambda a, b, x: a.permute(0, 2, 3, 1) + b.permute(0, 2, 3, 1),
        nn.Linear(8, 4),
    ),
    "in place": (lambda a, b, x: torch.cat([a, b], 1).add_(1), nn.Conv2d(16, 4, 1)),
    "channels unknown": (lambda a, b, x: torch.cat([a, b, x.cumsum(1)], 1), nn.Conv2d(19, 4, 1)),
    "transposed": (lambda a, b, x: torch.cat([a, b], 1), nn.ConvTranspose2d(16, 4, 2)),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_does_not(name: str) -> None:
    join, reader = STAYS[name]
    check(converted(Net(join, reader, nn.SiLU)), 2)


def test_a_constant_of_unknown_rank() -> None:
    """It could broadcast to more channels: its site stays, and the branch beside it goes on."""
    join = lambda a, b, x: torch.cat([a + torch.ones(8, 1, 1), b], 1)  # noqa: E731
    check(converted(Net(join, nn.Conv2d(16, 4, 1), nn.ReLU)), 1)


def test_one_blocked_branch_holds_the_other_only_where_they_are_added() -> None:
    class Read(Net):
        def forward(self, x: Tensor) -> Tensor:
            a, b = self.one(x), self.two(x)
            return self.reader(torch.cat([a, b], 1)) + a.sigmoid().mean(1, keepdim=True)

    check(converted(Read(torch.add, nn.Conv2d(16, 4, 1), nn.SiLU)), 1)


def test_a_shared_reader_is_left_alone() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            joined = torch.cat([self.one(x), self.two(x)], 1)
            return self.reader(joined) + self.reader(torch.cat([joined[:, 8:], joined[:, :8]], 1))

    check(converted(Twice(torch.add, nn.Conv2d(16, 4, 1), nn.SiLU)), 2)


@pytest.mark.parametrize(
    ("name", "act", "sunk"), [("cat", nn.SiLU, 2), ("a sum", nn.ReLU, 2), ("a product", nn.SiLU, 0)]
)
@torch.no_grad()
def test_the_pass_alone_moves_what_it_says_and_nothing_in_a_second_run(
    name: str, act: Callable[[], nn.Module], sunk: int
) -> None:
    joins: dict[str, tuple[Callable[..., Tensor], int]] = {
        "cat": PASSES["cat"], "a sum": (lambda a, b, x: a + b, 8), "a product": (STAYS["a product"][0], 8),
    }  # fmt: skip
    join, channels = joins[name]
    model = converted(Net(join, nn.Conv2d(channels, 4, 1), act)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gm = traced(model, IMAGES.double())
    run_pipeline((UnshareStatistics(), RouteAffine(through_padding=False)), gm)
    result = run(SinkAffine(), gm)
    assert result.rewritten == sunk
    assert [note.code for note in result.notes] == sunk * ["PN210"]
    whole = [m for m in gm.modules() if isinstance(m, ProxyNormAct) and m.outputs == ("output",)]
    assert len(whole) == 2 - sunk
    torch.testing.assert_close(gm(IMAGES.double()), model(IMAGES.double()), rtol=TOLERANCE, atol=TOLERANCE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_report_says_where_scale_and_shift_went() -> None:
    class Read(Net):
        def forward(self, x: Tensor) -> Tensor:
            a, b = self.one(x), self.two(x)
            gate = a.mean((2, 3), keepdim=True).sigmoid()
            return self.reader(torch.cat([a, b], 1)) + (b * gate).mean(1, keepdim=True)

    converted_model = converted(Read(torch.add, nn.Conv2d(16, 4, 1), nn.SiLU))
    assert [site.affine for site in pn_compiler.sites(converted_model)] == ["", ""]
    table = {site.name: site.affine for site in pn_compiler.sites(pn_compiler.fold(converted_model))}
    assert table == {"one.1": "behind its activation", "two.1": "behind its activation"}
    joined = converted(Net(PASSES["cat"][0], nn.Conv2d(16, 4, 1), nn.SiLU))
    folded = pn_compiler.fold(joined)
    assert {site.affine for site in pn_compiler.sites(folded)} == {"into reader"}
    apart = converted(Net(lambda a, b, x: torch.sigmoid(a) + b, nn.Conv2d(8, 4, 1), nn.ReLU))
    assert [site.affine for site in pn_compiler.sites(pn_compiler.fold(apart))] == [
        "into its bounds", "into reader",
    ]  # fmt: skip
