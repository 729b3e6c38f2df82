"""A pass of a user's own in the pipeline of transform."""

from collections.abc import Iterable

import pytest
import torch
from torch import fx, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError, PassError, TraceError
from pn_compiler.graph.graph_utils import called_module
from pn_compiler.graph.pass_base import GraphPass, PassGroup, PassResult
from pn_compiler.passes.convert.insert_proxy_norm import InsertProxyNorm
from pn_compiler.passes.convert.replace_batch_norm import ReplaceBatchNorm
from pn_compiler.passes.convert.share_statistics import ShareStatistics
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests.passes.graphs import called

X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


class RemoveDropout(GraphPass):
    """Removes each nn.Dropout of a model in eval mode, where it returns its input."""

    preserves_outputs = True

    def __init__(self, kind: type[nn.Module] = nn.Dropout) -> None:
        self.kind = kind

    def run(self, gm: fx.GraphModule) -> PassResult:
        calls = [node for node in gm.graph.nodes if isinstance(called_module(gm, node), self.kind)]
        for node in calls:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        return PassResult(rewritten=len(calls))


def network() -> nn.Module:
    layers = (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 2, 1), nn.Tanh())
    return randomize_batch_norms(nn.Sequential(*layers)).eval()


def test_a_pass_is_added() -> None:
    model = network()
    plain = pn_compiler.transform(model, X)
    for edit in (
        lambda passes: (RemoveDropout(), *passes),
        lambda passes: (*passes[:-1], RemoveDropout(), passes[-1]),
        lambda passes: (*passes[:-1], PassGroup(RemoveDropout(), passes[-1])),
    ):
        converted = pn_compiler.transform(model, X, pipeline=edit)
        assert isinstance(plain, fx.GraphModule)
        assert isinstance(converted, fx.GraphModule)
        assert nn.Dropout in called(plain)
        assert nn.Dropout not in called(converted)
        assert_same_outputs(converted(X), plain(X))
        assert pn_compiler.sites(converted) == pn_compiler.sites(plain)


def test_a_pass_that_should_not_change_outputs_and_does_is_an_error() -> None:
    with pytest.raises(TraceError, match="something else"):
        pn_compiler.transform(network(), X, pipeline=lambda passes: (RemoveDropout(nn.Tanh), *passes))


def test_a_pass_is_left_out() -> None:
    absent = (InsertProxyNorm, ShareStatistics)  # the second requires the first

    def without_proxies(passes: tuple[GraphPass, ...]) -> Iterable[GraphPass]:
        return (graph_pass for graph_pass in passes if not isinstance(graph_pass, absent))

    (site,) = pn_compiler.sites(pn_compiler.transform(network(), X, pipeline=without_proxies))
    assert site.kind == "norm_only"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda passes: passes[1:], "ReplaceBatchNorm requires CanonicalizeModules before it"),
        (lambda passes: passes[::-1], "requires"),
        (
            lambda passes: [p for p in passes if not isinstance(p, InsertProxyNorm)],
            "requires InsertProxyNorm",
        ),
        (lambda passes: passes[:4], "left out ReplaceBatchNorm"),
        (lambda passes: (*passes, ReplaceBatchNorm), "expected instances of GraphPass"),
    ],
)
def test_pipelines_that_cannot_work_are_errors(edit: object, message: str) -> None:
    with pytest.raises(PassError, match=message):
        pn_compiler.transform(network(), X, pipeline=edit)  # type: ignore[arg-type]  # what a user may write


@pytest.mark.parametrize("edit", [3, RemoveDropout, "passes"])
def test_a_pipeline_is_a_function(edit: object) -> None:
    with pytest.raises(ConfigError, match="pipeline="):
        pn_compiler.transform(network(), X, pipeline=edit)  # type: ignore[arg-type]  # what a user may write
