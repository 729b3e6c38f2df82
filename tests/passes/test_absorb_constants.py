"""Constant scales and shifts: where they go, where they stay, and that the outputs stay the same."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from pn_compiler.nn import ConstantAffine
from pn_compiler.passes.freeze.absorb_constants import AbsorbConstants
from pn_compiler.testing import assert_same_outputs, count_modules
from tests.passes import graphs


def affine(channels: int, *, positive: bool = False) -> ConstantAffine:
    scale = torch.rand(channels, dtype=torch.float64) + 0.1
    scale[0] *= 1 if positive else -1
    return ConstantAffine(scale, torch.randn(channels).double())


def run(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, int]:
    """The rewritten graph of `model` in float64, which computes the same, and the number of changes."""
    model = model.double().eval()
    gm = graphs.traced(model)
    rewritten = graphs.run(AbsorbConstants(), gm).rewritten
    with torch.no_grad():
        assert_same_outputs(gm(x.double()), model(x.double()))
    return gm, rewritten


@pytest.mark.parametrize(
    ("dimensions", "groups", "bias", "transposed"),
    [*itertools.product((1, 2, 3), (1, 2), (False, True), (False, True))],
)
def test_into_the_convolution_before_it(dimensions: int, groups: int, bias: bool, transposed: bool) -> None:
    """Padding and strides included: an affine of the output is exact everywhere."""
    torch.manual_seed(0)
    conv = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dimensions}d")
    layer = conv(4, 6, 3, padding=1, stride=2, groups=groups, bias=bias)
    gm, rewritten = run(nn.Sequential(layer, affine(6)), torch.randn(2, 4, *[7] * dimensions))
    assert rewritten == 1
    assert count_modules(gm, ConstantAffine) == 1  # its module is orphaned: RemoveDeadModules
    assert not [node for node in gm.graph.nodes if node.target == "1"]


@pytest.mark.parametrize("bias", [False, True])
def test_into_the_linear_layer_before_it(bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 5, bias=bias), affine(5))
    assert run(model, torch.randn(3, 2, 2, 2))[1] == 1


def test_not_into_a_linear_layer_on_another_axis() -> None:
    """[N, C, L] by a Linear over L: its outputs are no channels."""
    model = nn.Sequential(nn.Conv1d(2, 5, 1), nn.Linear(4, 5), affine(5))
    assert run(model, torch.randn(3, 2, 4))[1] == 0


class Reads(nn.Module):
    """conv -> affine, with something else that `reads` the convolution, the affine, or both."""

    def __init__(self, reads: Callable[["Reads", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.affine, self.next = nn.Conv2d(3, 3, 3), affine(3), nn.Conv2d(3, 3, 1)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.reads(self, y, self.affine(y))


@pytest.mark.parametrize(
    ("reads", "rewritten"),
    [
        (lambda m, y, z: y + z, 0),
        (lambda m, y, z: m.conv(z.relu()), 0),  # the convolution runs twice
        (lambda m, y, z: (z.relu(), m.conv.weight)[0] + m.conv.weight.sum(), 0),
        (lambda m, y, z: z.view(y.size(0), -1), 1),  # reads no value
        (lambda m, y, z: y.sum() + m.next(z), 1),  # into what is behind it
        (lambda m, y, z: y.sum() + m.next(z) + z, 0),
        (lambda m, y, z: y.sum() + m.next(nn.functional.max_pool2d(z, 2)), 0),  # a scale is negative
    ],
)
def test_what_else_reads_decides(reads: Callable[..., Tensor], rewritten: int) -> None:
    assert run(Reads(reads), torch.randn(2, 3, 8, 8))[1] == rewritten


def test_not_where_the_input_is_overwritten_afterwards() -> None:
    class Overwrites(Reads):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.affine(y)
            y[:, :1].mul_(2.0)
            return self.next(z) + y

    assert run(Overwrites(torch.add), torch.randn(2, 3, 8, 8))[1] == 0


def test_not_what_a_gate_takes_in() -> None:
    def gated(m: Reads, y: Tensor, z: Tensor) -> Tensor:
        return m.next(m.affine(y, y.mean((2, 3), keepdim=True))) + z

    assert run(Reads(gated), torch.randn(2, 3, 8, 8))[1] == 0


@pytest.mark.parametrize("kind", ["hook", "tied", "spectral_norm"])
def test_not_into_a_weight_that_is_not_its_own(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), affine(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    if kind == "hook":
        model[0].register_forward_hook(lambda module, args, output: 2 * output)
    elif kind == "tied":
        model[3].weight = model[0].weight
    else:
        nn.utils.parametrizations.spectral_norm(model[0])
    assert run(model, torch.randn(2, 3, 4, 4))[1] == 0


def behind_relu(*readers: nn.Module, positive: bool = True) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), affine(4, positive=positive), *readers)


@pytest.mark.parametrize(
    ("model", "rewritten"),
    [
        (behind_relu(nn.Conv2d(4, 2, 3, groups=2)), 1),
        (behind_relu(nn.Conv2d(4, 2, 3), positive=False), 1),
        (behind_relu(nn.MaxPool2d(2, padding=1), nn.Conv2d(4, 2, 3)), 1),
        (behind_relu(nn.MaxPool2d(2), nn.Conv2d(4, 2, 3), positive=False), 0),
        (behind_relu(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 2)), 1),
        (behind_relu(nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect")), 1),
        (behind_relu(nn.Conv2d(4, 2, 3, padding=1)), 0),  # pads z with zeros
        (behind_relu(nn.ConvTranspose2d(4, 2, 3)), 0),  # fewer taps reach its border
        (behind_relu(nn.ReLU()), 0),
        (behind_relu(), 0),
    ],
)
def test_into_what_reads_it(model: nn.Module, rewritten: int) -> None:
    assert run(model, torch.randn(2, 3, 8, 8))[1] == rewritten


def test_a_scale_alone_passes_a_padding() -> None:
    model = behind_relu(nn.Conv2d(4, 2, 3, padding=1))
    model[2].shift = None  # type: ignore[index]  # a Sequential
    assert run(model, torch.randn(2, 3, 8, 8))[1] == 2  # the shift 0 was written out on the way


def test_what_stays_is_one_operator() -> None:
    model = behind_relu(nn.Sigmoid())
    model[2].scale = None  # type: ignore[index]  # a Sequential
    gm, rewritten = run(model, torch.randn(2, 3, 8, 8))
    assert rewritten == 1
    assert gm.get_submodule("2").scale.eq(1).all()  # type: ignore[operator, union-attr]  # a tensor
