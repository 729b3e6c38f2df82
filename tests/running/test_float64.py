"""The float64 reference: what a float64 copy of the model computes, without the copy."""

import copy

import pytest
import torch
from torch import nn

import pn_compiler
from pn_compiler.running.float64 import Float64
from pn_compiler.testing import randomize_batch_norms


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "bias"), [(1, 1, 1, True), (2, 2, 1, False), ((1, 2), (2, 0), 2, True)]
)
def test_equals_a_float64_copy(stride: int, padding: int, dilation: int, bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, (3, 5), stride, padding, dilation, groups=8, bias=bias), nn.BatchNorm2d(8), nn.SiLU(),
        nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    x = torch.randn(2, 4, 17, 19, dtype=torch.float64)
    net(x.float())
    model = pn_compiler.transform(randomize_batch_norms(net), x.float(), warm_start="none").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x)
        model(x.float())  # fills what the model remembers in evaluation
        with Float64(model):
            actual = model(x)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
