"""The pass contract: order, errors, a second run that changes nothing."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

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
from pn_compiler.graph.ranks import infer_ranks
from pn_compiler.passes import fold_pipeline, freeze_pipeline, transform_pipeline
from pn_compiler.passes.convert.insert_proxy_norm import InsertProxyNorm
from pn_compiler.passes.convert.replace_batch_norm import ReplaceBatchNorm
from pn_compiler.passes.remove_dead_modules import RemoveDeadModules
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from pn_compiler.tracing.trace_module import trace_module

CONSTANTS = {"1": (torch.tensor([1.0, -1, 2, 0.5]), torch.tensor([1.0, 0, -1, 2]))}


def network() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    return randomize_batch_norms(net).eval()


def traced(model: nn.Module) -> fx.GraphModule:
    graph, _, _ = trace_module(copy.deepcopy(model))
    infer_ranks(graph)
    return graph


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


@pytest.mark.parametrize("proxy_padding", ["activation", "output"])
def test_a_second_run_rewrites_nothing(proxy_padding: str) -> None:
    graph = traced(network())
    passes = transform_pipeline(TransformConfig(proxy_padding=proxy_padding))  # type: ignore[arg-type]
    assert run_pipeline(passes, graph).rewritten
    assert not run_pipeline(passes, graph).rewritten
    for passes in (fold_pipeline(), freeze_pipeline(CONSTANTS)):
        assert run_pipeline(passes, graph).rewritten
        assert not run_pipeline(passes, graph).rewritten


def test_passes_that_claim_to_preserve_outputs_do() -> None:
    graph = traced(network()).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    claims = 0
    constants = {name: (scale.double(), shift.double()) for name, (scale, shift) in CONSTANTS.items()}
    passes = transform_pipeline(TransformConfig(warm_start="none", proxy_padding="output"))
    for graph_pass in (*passes, *fold_pipeline(), *freeze_pipeline(constants)):
        before = graph(x)
        graph_pass(graph)
        if graph_pass.preserves_outputs:
            claims += 1
            assert_same_outputs(graph(x), before)
    assert claims == 15


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
    for graph_pass in (*transform_pipeline(TransformConfig()), *fold_pipeline(), *freeze_pipeline({})):
        text = type(graph_pass).__doc__ or ""
        assert "Outputs:" in text, type(graph_pass).__name__
        assert len(text.splitlines()[0]) < 110
