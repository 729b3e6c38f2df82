"""Where the scale and shift of a site may go: what commutes with them, by rank, and what blocks them."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from pn_compiler.graph.ranks import infer_ranks
from pn_compiler.passes.absorption import Router, commutes
from pn_compiler.tracing.trace_module import trace_module


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


def traced(model: nn.Module) -> tuple[fx.GraphModule, fx.Node, Any]:
    """The graph, the value that is read, and the readers."""
    gm, _, _ = trace_module(model)
    infer_ranks(gm)
    value = next(node for node in gm.graph.nodes if node.target == "bn")
    return gm, value, next(node for node in gm.graph.nodes if node.op == "output").args[0]


def test_a_pool_commutes_if_it_pools_pixels_only() -> None:
    gm, value, (readers, conv, sample) = traced(Readers())
    found = [commutes(gm, reader, value, through_padding=True) for reader in readers]
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

    gm, value, readers = traced(Unknown())
    assert not any(commutes(gm, reader, value, through_padding=True) for reader in readers)


def test_a_value_that_a_view_shows_overwritten_blocks_all_its_readers() -> None:
    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.bn(x)
            y[:, :2].mul_(2.0)
            return self.conv(y), y.size(0)

    gm, value, _ = traced(Overwritten())
    route = Router(gm, through_padding=True).route(value, 6)
    assert not route.absorbers
    assert len(route.blocked) == 2  # the slice and the convolution, not the shape
    assert all("overwritten" in blocked.reason for blocked in route.blocked)
