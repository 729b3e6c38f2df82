"""HoistActivations alone: before which views and dropouts an activation goes, and before which not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pn_compiler.passes.prepare.hoist_activations import HoistActivations
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests.passes.graphs import called, run, traced, untouched


class Between(nn.Module):
    """A function between a BatchNorm and an activation."""

    def __init__(self, function: Callable[[Any, Tensor], Any], activation: nn.Module | None = None) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(4), activation or nn.ReLU()
        self.drop, self.overwrites, self.hooked = nn.Dropout(), nn.Dropout(inplace=True), nn.Flatten()
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.shuffle, self.unflatten = nn.PixelShuffle(2), nn.Unflatten(1, (2, 2))
        self.groups, self.flatten = nn.ChannelShuffle(2), nn.Flatten(2)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.act(self.function(self, self.bn(x)))


BATCH = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
VIEWS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "contiguous": lambda m, y: y.contiguous(),
    "flatten": lambda m, y: torch.flatten(y, 1),
    "movedim": lambda m, y: y.movedim(1, -1),
    "permute": lambda m, y: y.permute(0, 2, 3, 1),
    "reshape": lambda m, y: y.reshape(y.size(0), -1),
    "reshape_as": lambda m, y: y.reshape_as(y),
    "squeeze": lambda m, y: y.squeeze(),
    "swapaxes": lambda m, y: y.swapaxes(1, 2),
    "swapdims": lambda m, y: y.swapdims(1, 2),
    "transpose": lambda m, y: y.transpose(1, 3),
    "t": lambda m, y: y.flatten(1).t(),
    "unflatten": lambda m, y: y.unflatten(1, (2, 2)),
    "unsqueeze": lambda m, y: y.unsqueeze(1),
    "view": lambda m, y: y.view(2, -1),
    "view_as": lambda m, y: y.view_as(y),
    "Flatten": lambda m, y: m.flatten(y),
    "Unflatten": lambda m, y: m.unflatten(y),
    "PixelShuffle": lambda m, y: m.shuffle(y),
    "ChannelShuffle": lambda m, y: m.groups(y),
    "several": lambda m, y: m.flatten(y).transpose(1, 2).contiguous(),
}
DROPOUTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Dropout": lambda m, y: m.drop(y),
    "dropout": lambda m, y: F.dropout(y),
    "dropout1d": lambda m, y: F.dropout1d(y.flatten(2)),
    "dropout2d": lambda m, y: F.dropout2d(y),
    "dropout3d": lambda m, y: F.dropout3d(y.unsqueeze(2)),
}
STAYS: dict[str, tuple[Callable[[Any, Tensor], Any], nn.Module]] = {
    **{name: (function, nn.SiLU()) for name, function in DROPOUTS.items()},
    "a dropout in place": (lambda m, y: m.overwrites(y), nn.ReLU()),
    "a slope per channel": (VIEWS["flatten"], nn.PReLU(36)),
    "a view with hooks": (lambda m, y: m.hooked(y), nn.ReLU()),
    "another dtype": (lambda m, y: y.view(torch.int64).view(torch.float64), nn.ReLU()),
    "an addition": (lambda m, y: y + 1, nn.ReLU()),
    "alpha dropout": (lambda m, y: F.alpha_dropout(y), nn.ReLU()),
    "a reader of the view": (lambda m, y: (z := y.flatten(1)) + 0 * z.sum(), nn.ReLU()),
    "nothing between": (lambda m, y: y, nn.ReLU()),
    "overwritten": (lambda m, y: doubled(y), nn.ReLU()),
}


def doubled(y: Tensor) -> Tensor:
    y[:, :1].mul_(2.0)
    return y.flatten(1)


def by_hand(model: Between, x: Tensor) -> Tensor:
    torch.manual_seed(1)  # of the dropouts
    return model(x)


def hoisted(gm: fx.GraphModule) -> bool:
    """Whether the activation reads the BatchNorm itself."""
    (act,) = (node for node in gm.graph.nodes if node.target == "act")
    return act.all_input_nodes[0].target == "bn"


@pytest.mark.parametrize("name", [*VIEWS, *DROPOUTS])
@torch.no_grad()
def test_an_activation_goes_before_every_view_and_dropout(name: str) -> None:
    model = randomize_batch_norms(Between({**VIEWS, **DROPOUTS}[name])).double()
    model.bn.eval()  # the dropouts stay in train mode
    gm = traced(model)
    result = run(HoistActivations(), gm)
    assert result.rewritten >= 1
    assert hoisted(gm)
    torch.manual_seed(1)
    assert_same_outputs(gm(BATCH), by_hand(model, BATCH))


@pytest.mark.parametrize("name", STAYS)
@torch.no_grad()
def test_it_stays_behind_what_it_does_not_commute_with(name: str) -> None:
    function, activation = STAYS[name]
    model = randomize_batch_norms(Between(function, activation)).double()
    model.bn.eval()
    gm = traced(model)
    untouched(HoistActivations(), gm)
    torch.manual_seed(1)
    assert_same_outputs(gm(BATCH), by_hand(model, BATCH))


def test_an_activation_with_hooks_stays() -> None:
    model = Between(VIEWS["flatten"])
    model.act.register_forward_hook(lambda module, args, output: output + 1)
    untouched(HoistActivations(), traced(model))


def test_shapes_are_read_from_the_input_unless_that_is_overwritten() -> None:
    def sized(m: Any, y: Tensor) -> Tensor:
        return y * y.size(0)

    gm = traced(Between(sized))
    assert run(HoistActivations(), gm).rewritten == 1
    (size,) = (node for node in gm.graph.nodes if node.target == "size")
    assert size.all_input_nodes[0].op == "placeholder"
    assert called(gm) == [nn.BatchNorm2d, nn.ReLU]

    class Overwrites(Between):
        def forward(self, x: Tensor) -> Any:
            x = x + 1
            y = self.bn(x)
            x.unsqueeze_(0)
            return y * y.dim() + x

    untouched(HoistActivations(), traced(Overwrites(sized)))
