"""Results that round are moved by a few units in the last place; exact ones stay."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.running.last_digits import OtherLastDigits

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 4, 3), nn.Linear(8, 8), nn.BatchNorm2d(3).train(), nn.BatchNorm2d(3).eval(), nn.SiLU(True)],
)
@torch.no_grad()
def test_results_that_round_move_a_little(layer: nn.Module, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    expected = layer(X.to(dtype, copy=True))
    with OtherLastDigits():
        moved = layer(X.to(dtype, copy=True))
    assert moved.dtype == dtype
    assert not torch.equal(moved, expected)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(moved, expected, rtol=10 * eps, atol=10 * eps)


@torch.no_grad()
def test_exact_results_stay() -> None:
    def exact(x: Tensor) -> Tensor:
        y = F.relu(x) * 2 + torch.cat([x, x], 1)[:, :3]
        return torch.where(y == y.amax(1, keepdim=True), y, 0.5)

    with OtherLastDigits():
        moved = exact(X)
    assert torch.equal(moved, exact(X))
