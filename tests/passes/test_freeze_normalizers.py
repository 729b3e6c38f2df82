"""Normalizers that have constants become affines; the others stay."""

import pytest
import torch
from torch import Tensor, nn

from pn_compiler.nn import ConstantAffine
from pn_compiler.passes.freeze.freeze_normalizers import FreezeNormalizers
from pn_compiler.testing import assert_batch_independent, assert_same_outputs, count_modules
from tests.passes.graphs import called, per_channel, run, traced, untouched

SCALE = torch.tensor([1.5, -0.5, 0.0, 2.0], dtype=torch.float64)
SHIFT = torch.tensor([0.5, 1.0, -1.0, 0.0], dtype=torch.float64)


def affine(x: Tensor) -> Tensor:
    return x * per_channel(SCALE, x) + per_channel(SHIFT, x)


@pytest.mark.parametrize("rank", [1, 2, 3])
@torch.no_grad()
def test_only_those_with_constants(rank: int) -> None:
    conv = getattr(nn, f"Conv{rank}d")
    model = nn.Sequential(conv(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.GroupNorm(1, 4)).double().eval()
    gm = traced(model)
    frozen = FreezeNormalizers({"1": (SCALE, SHIFT), "nothing": (SCALE, SHIFT)})
    result = run(frozen, gm)
    assert result.rewritten == 1
    assert not result.notes
    assert called(gm) == [conv, ConstantAffine, nn.ReLU, nn.GroupNorm]
    assert not gm.get_submodule("1").training
    x = torch.randn(2, 3, *[5] * rank, dtype=torch.float64)
    assert_same_outputs(gm(x), model[3](torch.relu(affine(model[0](x)))))
    assert_batch_independent(gm, x)
    assert type(model[1]) is nn.GroupNorm  # that of the caller


@torch.no_grad()
def test_a_normalizer_called_twice_is_frozen_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(1, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.relu(self.norm(x)))

    gm = traced(Twice())
    assert run(FreezeNormalizers({"norm": (SCALE, SHIFT)}), gm).rewritten == 1
    assert count_modules(gm, ConstantAffine) == 1
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert_same_outputs(gm(x), affine(torch.relu(affine(x))))


def test_without_constants_nothing_changes() -> None:
    untouched(FreezeNormalizers({}), traced(nn.Sequential(nn.GroupNorm(1, 4), nn.ReLU())))
