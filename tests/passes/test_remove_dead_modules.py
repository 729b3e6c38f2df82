"""Modules that no node calls or reads are removed; those that one does stay."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.passes.remove_dead_modules import RemoveDeadModules
from pn_compiler.testing import assert_same_outputs
from tests.passes.graphs import run, traced, untouched

X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """It calls one module, and reads parameters of two others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid())
        self.read = nn.Conv2d(4, 2, 1)
        self.holder = nn.Module()
        self.holder.bias = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.body(x), self.read.weight, self.holder.bias)


def test_what_nothing_calls_or_reads_goes() -> None:
    model = Net().double().eval()
    gm = traced(model)
    names = set(gm.state_dict())
    gm.add_submodule("unused", nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    gm.add_submodule("holder.unread", nn.Conv2d(2, 2, 1))
    result = run(RemoveDeadModules(), gm)
    assert result.rewritten == 4  # unused, its two, and one of the holder
    assert not result.notes
    assert set(dict(gm.named_modules())) == {"", "body", "body.0", "body.1", "read", "holder"}
    assert_same_outputs(gm(X), F.conv2d(model.body(X), model.read.weight, model.holder.bias))
    assert set(gm.state_dict()) == names


def test_what_an_earlier_pass_orphaned_goes() -> None:
    gm = traced(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.ReLU()).double())
    (sigmoid,) = (node for node in gm.graph.nodes if node.target == "1")
    sigmoid.replace_all_uses_with(sigmoid.all_input_nodes[0])
    gm.graph.erase_node(sigmoid)
    gm.recompile()
    before = gm(X)
    assert run(RemoveDeadModules(), gm).rewritten == 1
    assert set(dict(gm.named_modules())) == {"", "0", "2"}
    assert_same_outputs(gm(X), before)


def test_a_module_of_two_names_goes_under_the_one_that_nothing_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.again = self.conv

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = Twice().double()
    gm = traced(model)
    RemoveDeadModules()(gm)
    assert [name for name, _ in gm.named_modules(remove_duplicate=False)] == ["", "conv"]
    assert_same_outputs(gm(X), model(X))


def test_where_all_is_used_nothing_changes() -> None:
    gm = traced(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())))
    untouched(RemoveDeadModules(), gm)
