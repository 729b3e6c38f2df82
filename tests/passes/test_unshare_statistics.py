"""Sites compute their proxy statistics themselves again. With ShareStatistics: test_share_statistics.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.nn import ProxyNormAct, ProxyStatistics
from pn_compiler.passes.fold.unshare_statistics import UnshareStatistics
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests.passes.graphs import called, randomize_proxies, run, site_by_hand, untouched

X = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three calls of two sites, whose activations are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.two(F.silu(self.one(F.silu(self.one(x))))))


def converted(model: nn.Module) -> fx.GraphModule:
    gm = pn_compiler.transform(randomize_batch_norms(model).double().eval(), warm_start="none")
    assert isinstance(gm, fx.GraphModule)
    randomize_proxies(gm)
    return gm


def test_every_call_computes_for_itself() -> None:
    gm = converted(Net())
    assert called(gm) == [ProxyStatistics, *[ProxyNormAct] * 3]
    names = set(gm.state_dict())
    result = run(UnshareStatistics(), gm)
    assert result.rewritten == 3  # one a call
    assert not result.notes
    assert called(gm) == [ProxyNormAct] * 3
    assert [node.op for node in gm.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    assert set(gm.state_dict()) == names
    y = X
    for name in ("one", "one", "two"):
        site = gm.get_submodule(name)
        assert isinstance(site, ProxyNormAct)
        y = site_by_hand(y, site, F.silu)
    assert_same_outputs(gm(X), y, tolerance=1e-7)  # quadrature of SiLU


def test_sites_that_share_nothing_stay() -> None:
    gm = converted(nn.Sequential(nn.BatchNorm2d(3), nn.SiLU(), nn.BatchNorm2d(3), nn.GELU()))
    assert called(gm) == [ProxyNormAct] * 2
    untouched(UnshareStatistics(), gm)
