"""The pass contract: order, errors, a second run that changes nothing."""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pn_compiler.passes
from pn_compiler.base.config import TransformConfig
from pn_compiler.base.errors import PassError, PostconditionError
from pn_compiler.graph.pass_base import (
    GraphPass,
    PassGroup,
    PassResult,
    check_complete,
    check_order,
    run_pipeline,
)
from pn_compiler.passes import fold_pipeline, freeze_pipeline, narrow_pipeline, transform_pipeline
from pn_compiler.passes.convert.insert_proxy_norm import InsertProxyNorm
from pn_compiler.passes.convert.replace_batch_norm import ReplaceBatchNorm
from pn_compiler.passes.remove_dead_modules import RemoveDeadModules
from pn_compiler.passes.route_affine import RouteAffine
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests.passes.graphs import traced

X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
CONSTANTS = {
    path: (torch.linspace(-0.7, 2.0, size), torch.linspace(-1.0, 1.0, size))
    for path, size in {"1": 4, "bn1": 4, "bn2": 4, "bn4": 4, "bn5": 2}.items()
}


def network() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    return randomize_batch_norms(net).eval()


def test_order_is_checked_before_any_work() -> None:
    config = TransformConfig()
    with pytest.raises(PassError, match="InsertProxyNorm must run after ReplaceBatchNorm"):
        check_order((InsertProxyNorm(config), ReplaceBatchNorm(config)))


def test_a_pass_that_another_requires_must_be_there() -> None:
    config = TransformConfig()
    check_complete(transform_pipeline(config))
    with pytest.raises(PassError, match="InsertProxyNorm requires ReplaceBatchNorm before it"):
        check_complete((InsertProxyNorm(config),))


def test_groups_of_passes_are_passes() -> None:
    config = TransformConfig()
    *_, replace, insert, route, share, remove = transform_pipeline(config)
    check_complete(transform_pipeline(config)[:-5] + (PassGroup(replace, PassGroup(insert, route)), share))
    with pytest.raises(PassError, match="InsertProxyNorm must run after ReplaceBatchNorm"):
        check_order((PassGroup(PassGroup(insert), replace),))
    nested, flat = traced(network()), traced(network())
    result = run_pipeline((PassGroup(replace, PassGroup(insert, route)), share, remove), nested)
    assert result == run_pipeline((replace, insert, route, share, remove), flat)
    assert nested.code == flat.code


class Everything(nn.Module):
    """It gives every pass something to do: a function, an expression, a view, branches, a gate, a clip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2, self.squeeze = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.conv3, self.bn3, self.join = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(12, 4, 1)
        self.bn4, self.head, self.bn5 = nn.BatchNorm2d(4), nn.Linear(100, 2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.stem.weight, self.stem.bias)
        x = F.relu_(self.bn1(x))
        y = self.bn2(self.conv2(x))
        y = y * F.hardsigmoid(y)
        y = y * self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()
        z = self.bn3(self.conv3(y)).relu()
        x = F.relu6(self.bn4(self.join(torch.cat([z, x], 1))).flatten(1))
        return self.bn5(self.head(x + 1))


@pytest.mark.parametrize("proxy_padding", ["activation", "output"])
@pytest.mark.parametrize(("build", "warm_start"), [(network, "auto"), (Everything, "none")])
def test_a_second_run_rewrites_nothing(
    build: Callable[[], nn.Module], warm_start: Any, proxy_padding: Any
) -> None:
    gm = traced(randomize_batch_norms(build()).eval(), X)
    passes = transform_pipeline(TransformConfig(warm_start=warm_start, proxy_padding=proxy_padding))
    assert run_pipeline(passes, gm).rewritten
    assert not run_pipeline(passes, gm).rewritten
    for passes in (fold_pipeline(), freeze_pipeline(CONSTANTS)):
        assert run_pipeline(passes, gm).rewritten
        assert not run_pipeline(passes, gm).rewritten


def own_passes() -> set[type[GraphPass]]:
    """Every pass of this package, whether or not a pipeline runs it."""
    for module in pkgutil.walk_packages(pn_compiler.passes.__path__, "pn_compiler.passes."):
        importlib.import_module(module.name)
    return {cls for cls in GraphPass.__subclasses__() if cls.__module__.startswith("pn_compiler.passes.")}


@torch.no_grad()
def test_passes_that_claim_to_preserve_outputs_change_a_graph_and_do() -> None:
    x = X.double()
    gm = traced(randomize_batch_norms(Everything()).double().eval(), x)
    constants = {path: (scale.double(), shift.double()) for path, (scale, shift) in CONSTANTS.items()}
    passes = transform_pipeline(TransformConfig(warm_start="none", proxy_padding="output"))
    claims = set()
    narrow = narrow_pipeline({"bn3": (2, 8, 5, 5)}, multiple=1)
    for graph_pass in (*passes, *fold_pipeline(), *freeze_pipeline(constants), *narrow):
        before = gm(x)
        assert graph_pass(gm).rewritten > 0, type(graph_pass).__name__
        if graph_pass.preserves_outputs:
            claims.add(type(graph_pass))
            assert_same_outputs(gm(x), before)
    assert claims == {*(cls for cls in own_passes() if cls.preserves_outputs), RouteAffine}


def test_every_pass_has_a_test_file() -> None:
    modules = {cls.__module__.rpartition(".")[2] for cls in own_passes()}
    files = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    assert modules
    assert {f"test_{module}" for module in modules} <= files


class Failing(GraphPass):
    """Fails."""

    def run(self, gm: fx.GraphModule) -> PassResult:
        raise ZeroDivisionError("by design")


class Lying(GraphPass):
    """Breaks its promise."""

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (Failing,)

    def run(self, gm: fx.GraphModule) -> PassResult:
        return PassResult()

    def ensures(self, gm: fx.GraphModule) -> None:
        raise PostconditionError("nothing was done")


def test_a_failure_names_the_pass_its_place_and_the_cause() -> None:
    with pytest.raises(PassError, match="pass 1 of 2, Failing: ZeroDivisionError: by design"):
        run_pipeline((Failing(), Lying()), traced(network()))
    with pytest.raises(PassError, match=r"pass 2 of 2, Failing \(behind RemoveDeadModules\): Zero"):
        run_pipeline((RemoveDeadModules(), Failing()), traced(network()))
    with pytest.raises(PostconditionError, match="nothing was done"):
        run_pipeline((Lying(),), traced(network()))


def test_every_pass_explains_itself() -> None:
    passes = (*fold_pipeline(), *freeze_pipeline({}), *narrow_pipeline({}))
    for graph_pass in (*transform_pipeline(TransformConfig()), *passes):
        text = type(graph_pass).__doc__ or ""
        assert "Outputs:" in text, type(graph_pass).__name__
        assert len(text.splitlines()[0]) < 110
