"""Clips with bounds per channel become plain activations behind what is frozen, and only there."""

import pytest
import torch
from torch import Tensor, fx, nn

from pn_compiler.nn import ConstantAffine, ConstantClamp
from pn_compiler.passes.freeze.split_clips import SplitClips
from pn_compiler.testing import assert_same_outputs, count_modules
from tests.passes import graphs

X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def affine() -> ConstantAffine:
    return ConstantAffine(torch.randn(3).double(), torch.randn(3).double())


def clamp(*, upper: bool, lower: bool = True) -> ConstantClamp:
    low = torch.randn(3).double()
    return ConstantClamp(low if lower else None, low + 0.1 + torch.rand(3).double() if upper else None)


def run(model: nn.Module) -> tuple[fx.GraphModule, int]:
    gm = graphs.traced(model.double())
    rewritten = graphs.run(SplitClips(), gm).rewritten
    assert_same_outputs(gm(X), model(X))
    return gm, rewritten


@pytest.mark.parametrize(("upper", "plain"), [(False, nn.ReLU), (True, nn.ReLU6)])
def test_a_plain_activation_between_two_affines(upper: bool, plain: type[nn.Module]) -> None:
    torch.manual_seed(0)
    gm, rewritten = run(nn.Sequential(affine(), clamp(upper=upper)))
    assert rewritten == 1
    called = [type(gm.get_submodule(str(n.target))) for n in gm.graph.nodes if n.op == "call_module"]
    assert called == [ConstantAffine, plain, ConstantAffine]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.GroupNorm(1, 3), clamp(upper=True)),  # not frozen
        nn.Sequential(affine(), clamp(upper=True, lower=False)),
    ],
)
def test_left_alone(model: nn.Module) -> None:
    graph, rewritten = run(model)
    assert rewritten == 0
    assert count_modules(graph, ConstantClamp) == 1


class Twice(nn.Module):
    """A site that is called twice, or whose normalizer something else reads."""

    def __init__(self, *, read: bool) -> None:
        super().__init__()
        self.affine, self.clamp, self.read = affine(), clamp(upper=False), read

    def forward(self, x: Tensor) -> Tensor:
        y = self.affine(x)
        z = self.clamp(y)
        return z + y if self.read else self.clamp(self.affine(z))


@pytest.mark.parametrize("read", [False, True])
def test_shared_sites_and_those_with_another_reader(read: bool) -> None:
    assert run(Twice(read=read))[1] == (not read)
