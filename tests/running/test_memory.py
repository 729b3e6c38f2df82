"""Whether a model fits into memory, found without values."""

import torch
from torch import Tensor, nn

from pn_compiler.running.inputs import Inputs
from pn_compiler.running.memory import refuse_giant_tensors


class Keeps(nn.Module):
    """Stores what it computes from its first input, as detectors store their anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(x.new_ones(3))
        return x * self.kept[0]


def test_nothing_without_values_stays_in_the_model() -> None:
    model, x = Keeps(), torch.randn(2, 3)
    refuse_giant_tensors(model, Inputs((x,), {}))
    assert model.kept == []
    assert torch.equal(model(x), x)
