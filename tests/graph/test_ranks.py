"""What is asked of ranks: of inputs without an example, of batches, sizes, pixels and flattened channels."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pn_compiler.graph.ranks import (
    dtype,
    has_batch_of_inputs,
    infer_ranks,
    pixels,
    rank,
    reads_batch,
    record_pixels,
    size_of,
)
from pn_compiler.running.inputs import Inputs
from pn_compiler.tracing.trace_module import trace_module

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    """A function of the input and of what the module holds."""

    def __init__(self, function: Callable[[Any, Tensor], Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.layer = function, layer or nn.Identity()
        self.conv, self.bn, self.linear = nn.Conv2d(4, 4, 1), nn.BatchNorm1d(5), nn.Linear(6, 5)
        self.register_buffer("index", torch.zeros(1, dtype=torch.long))
        self.weight, self.vector = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def inferred(module: nn.Module, x: Tensor | None) -> tuple[fx.GraphModule, Any]:
    """The graph with ranks inferred from the rank of `x`, and the node or nodes of its result."""
    gm, _, _ = trace_module(module)
    infer_ranks(gm, None if x is None else Inputs((x,)))
    return gm, next(node for node in gm.graph.nodes if node.op == "output").args[0]


class Unseen(nn.Module):
    """Asks of inputs of which nothing is known."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn1, self.other = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(6)
        self.conv, self.bn2, self.bn3 = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(4), nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Any:
        return (
            x, self.linear(x), F.relu(x) + 1, self.conv(x), F.conv1d(x, self.linear.weight[..., None]),
            self.bn2(x), self.bn3(x), self.bn1(self.linear(x)), self.other(self.linear(x)),
            x.flatten(1), x.view(x.size(0), -1), x.size(0), x.mean((2, 3)),
        )  # fmt: skip


def test_without_an_example_layers_tell() -> None:
    _, found = inferred(Unseen(), None)
    known = [rank(node) if isinstance(node, fx.Node) else node for node in found]
    assert known == [None, None, None, 4, 3, 4, 5, 2, None, 2, 2, 0, None]


def test_a_run_on_the_example_notes_pixels_shapes_and_dtypes() -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gm, _, _ = trace_module(model)
    drawn, x = torch.get_rng_state(), X.clone()
    record_pixels(gm, Inputs((x,)))
    infer_ranks(gm)
    noted = [(rank(n), pixels(n), dtype(n)) for n in gm.graph.nodes if n.op == "call_module"]
    assert noted == [(dims, values, torch.float32) for dims, values in ((4, 16), (4, 16), (2, 1), (2, 1))]
    assert gm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(x, X)


def test_an_example_that_does_not_run_is_no_error() -> None:
    gm, _, _ = trace_module(nn.Sequential(nn.Conv2d(3, 2, 1)))
    record_pixels(gm, Inputs((X,)))  # of 4 channels
    assert {pixels(node) for node in gm.graph.nodes if node.op == "call_module"} == {None}


def test_what_an_operator_over_n_axes_takes_for_a_batch() -> None:
    def function(m: Any, x: Tensor) -> Any:
        return m.layer(x), F.max_pool2d(x, 2), F.avg_pool1d(x[0], 2), x + 1

    gm, found = inferred(Function(function, nn.MaxPool3d(1)).eval(), X)
    assert [reads_batch(gm, node, node.all_input_nodes[0]) for node in found] == [False, True, True, False]


def test_sizes_and_batches_are_traced_to_their_tensor() -> None:
    def function(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        sizes = x.size(0), x.shape[0], x.size()[0], x.size(1), x.shape[-1], 2
        return sizes, (y, torch.cat([x, y], 1), F.relu(y) + x), (torch.cat([x, y]), y[0], y.transpose(0, 1))

    _, (sizes, same, others) = inferred(Function(function).eval(), X)
    (x,) = (node for node in same[0].graph.nodes if node.op == "placeholder")
    assert [size_of(size, 0) for size in sizes] == [x, x, x, None, None, None]
    assert all(map(has_batch_of_inputs, same))
    assert not any(map(has_batch_of_inputs, others))
