"""Normalizers that have constants become affines; the others stay."""

import torch
from torch import nn

from pn_compiler.nn import ConstantAffine
from pn_compiler.passes.freeze.freeze_normalizers import FreezeNormalizers
from pn_compiler.testing import assert_same_outputs, count_modules
from pn_compiler.tracing.trace_module import trace_module


def test_only_those_with_constants() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.GroupNorm(1, 4)).eval()
    gm, _, _ = trace_module(model)
    scale, shift = torch.randn(4), torch.randn(4)
    frozen = FreezeNormalizers({"1": (scale, shift), "nothing": (scale, shift)})
    assert frozen(gm).rewritten == 1
    assert frozen(gm).rewritten == 0
    assert count_modules(gm, ConstantAffine) == count_modules(gm, nn.GroupNorm) == 1
    assert not gm.get_submodule("1").training
    x = torch.randn(2, 3, 5, 5)
    want = model[3](torch.relu(model[0](x) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)))
    assert_same_outputs(gm(x), want)
