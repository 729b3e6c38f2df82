"""Kernels are stored channels-last for a while, and nothing else changes."""

import copy

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler import distill
from pn_compiler.recovery.memory_layout import channels_last
from pn_compiler.running.losses import divergence
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip
    return randomize_batch_norms(net).eval()


def last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def test_kernels_come_back_as_they_were() -> None:
    net, x = network(), torch.randn(2, 3, 9, 9)
    before = {name: (p, p.detach().clone(), p.stride()) for name, p in net.named_parameters()}
    expected = net(x)
    with channels_last(net):
        assert last(net[0].weight)
        assert last(net[0](x))
        assert_same_outputs(net(x), expected, tolerance=1e-5)
    for name, p in net.named_parameters():
        parameter, value, stride = before[name]
        assert p is parameter
        assert torch.equal(p, value)
        assert p.stride() == stride
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_shared_memory_stays_shared() -> None:
    net = network()
    net[3].weight.data = net[0].weight.data[:, :1]  # a view: of the same memory
    with channels_last(net):
        assert not last(net[0].weight)
        assert last(net[5].weight) or net[5].weight.shape[2:] == (1, 1)
    assert net[3].weight.data_ptr() == net[0].weight.data_ptr()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("proxy", [False, True])
def test_a_distillation_with_frozen_kernels(frozen: bool, proxy: bool) -> None:
    """The backward of a group_norm behind them must not see channels-last inputs without gradients."""
    net, x = network(), torch.randn(24, 3, 33, 33)
    converted = pn_compiler.transform(net, proxy=proxy)
    for name, p in converted.named_parameters():
        p.requires_grad_(not (frozen and p.ndim == 4) and name != "0.bias")
    strides = {name: p.stride() for name, p in converted.named_parameters()}
    given = copy.deepcopy(net.state_dict())
    student, report = distill(converted, net, x, steps=6)
    assert report.stopped == ""
    assert {name: p.stride() for name, p in student.named_parameters()} == strides
    assert all(torch.equal(value, given[name]) for name, value in net.state_dict().items())


def test_volumes_and_signals_stay_as_they_are() -> None:
    for net, x in (
        (nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU()), torch.randn(8, 2, 5, 5, 5)),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU()), torch.randn(8, 2, 9)),
    ):
        randomize_batch_norms(net).eval()
        _, report = distill(pn_compiler.transform(net), net, x, steps=2)
        assert report.stopped == ""


def test_the_result_is_what_was_measured() -> None:
    """Trained kernels are kept when their layout goes back."""
    net, x = network(), torch.randn(40, 3, 17, 17)
    converted = pn_compiler.transform(net, norm="layer")
    student, report = distill(converted, net, x, steps=8, lr=5e-3, held_out=0.5, seed=3)
    assert report.best_step > 0
    assert not torch.equal(student.get_parameter("3.weight"), converted.get_parameter("3.weight"))
    held = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:20]
    with torch.no_grad():
        found = divergence(student.eval()(x[held]), net(x[held]))
    assert found == pytest.approx(report.divergence_after, rel=1e-3)
    assert found < report.divergence_before
