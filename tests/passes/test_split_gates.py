"""Gates of frozen sites: the affine moves out of the product, and the squeeze reads its result."""

import pytest
import torch
from torch import Tensor, fx, nn

from pn_compiler.nn import ConstantAffine
from pn_compiler.passes.freeze.split_gates import SplitGates
from pn_compiler.testing import assert_same_outputs
from tests.passes import graphs

X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Gated(nn.Module):
    """Squeeze and excitation behind a site, as folding leaves it."""

    def __init__(self, *, frozen: bool = True, scale: bool = True, other: bool = False) -> None:
        super().__init__()
        self.norm = ConstantAffine(torch.randn(3), torch.randn(3)) if frozen else nn.GroupNorm(1, 3)
        self.act = nn.SiLU()
        self.squeeze = nn.Conv2d(3, 3, 1)
        self.gated = ConstantAffine(torch.rand(3) + 0.5 if scale else None, torch.randn(3))
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.norm(x))
        gate = self.squeeze(a.mean((2, 3), keepdim=True)).sigmoid()
        z = self.gated(a, gate)
        return z + a if self.other else z


def run(model: nn.Module) -> tuple[fx.GraphModule, int]:
    gm = graphs.traced(model.double(), X)
    rewritten = graphs.run(SplitGates(), gm).rewritten
    with torch.no_grad():
        assert_same_outputs(gm(X), model(X))
    return gm, rewritten


def calls(gm: fx.GraphModule, path: str) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target == path]


@pytest.mark.parametrize("scale", [False, True])
def test_the_squeeze_reads_the_result(scale: bool) -> None:
    torch.manual_seed(0)
    graph, rewritten = run(Gated(scale=scale))
    assert rewritten == 1
    (z,), (activation,) = calls(graph, "gated"), calls(graph, "act")
    assert z.args == (activation,)
    assert set(activation.users) == {z}


def test_a_negative_scale_keeps_the_squeeze_where_it_is() -> None:
    torch.manual_seed(0)
    model = Gated()
    model.gated.scale = torch.tensor([1.0, -0.5, 2.0])
    graph, rewritten = run(model)
    assert rewritten == 1
    (z,), (activation,) = calls(graph, "gated"), calls(graph, "act")
    assert z.args == (activation,)
    assert len(activation.users) == 2


def test_another_reader_keeps_the_activation() -> None:
    torch.manual_seed(0)
    graph, rewritten = run(Gated(other=True))
    assert rewritten == 1
    (z,), (activation,) = calls(graph, "gated"), calls(graph, "act")
    assert z.args == (activation,)
    assert len(activation.users) == 3


def test_a_site_that_is_not_frozen_keeps_its_gate() -> None:
    graph, rewritten = run(Gated(frozen=False))
    assert rewritten == 0
    (z,) = calls(graph, "gated")
    assert len(z.args) == 2
