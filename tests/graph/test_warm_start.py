"""The formula for weight and bias from running statistics."""

import pytest
import torch
from torch import nn

import pn_compiler
from pn_compiler.graph.warm_start import affine_from_running_stats, is_trained
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_exact_where_instance_statistics_are_those_of_the_population(groups: int) -> None:
    """Every image is a permutation of one set of pixels: all have the same mean and variance."""
    torch.manual_seed(0)
    pixels = torch.randn(8, 36, dtype=torch.float64) * torch.rand(8, 1).double() + torch.randn(8, 1).double()
    images = torch.stack([pixels[:, torch.randperm(36)] for _ in range(5)]).view(5, 8, 6, 6)
    norm = nn.BatchNorm2d(8, momentum=1.0, dtype=torch.float64)
    norm(images)  # running statistics of this population
    norm.running_var.copy_(images.var((0, 2, 3), unbiased=False))  # the biased variance that it normalizes by
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    net = nn.Sequential(norm).eval()
    converted = pn_compiler.transform(net, num_groups=groups)
    assert_same_outputs(converted(images), net(images))


def test_formula_channel_by_channel() -> None:
    norm = randomize_batch_norms(nn.BatchNorm2d(6, eps=1e-2))
    assert isinstance(norm, nn.BatchNorm2d)
    weight, bias = affine_from_running_stats(norm, 3)
    for c in range(6):
        group = [2 * (c // 2), 2 * (c // 2) + 1]
        mus = [float(norm.running_mean[k]) for k in group]
        sds = [(float(norm.running_var[k]) + 1e-2) ** 0.5 for k in group]
        m = sum(mus) / 2
        v = sum(sd**2 + mu**2 for sd, mu in zip(sds, mus, strict=True)) / 2 - m**2
        g, b = norm.weight[c].item(), norm.bias[c].item()
        sd = (float(norm.running_var[c]) + 1e-2) ** 0.5
        assert float(weight[c]) == pytest.approx(g * v**0.5 / sd, rel=1e-9)
        assert float(bias[c]) == pytest.approx(b + g * (m - float(norm.running_mean[c])) / sd, rel=1e-9)


def test_variance_keeps_its_digits_far_from_zero() -> None:
    norm = nn.BatchNorm2d(4)
    norm.running_mean.fill_(1e4)
    norm.running_var.fill_(1e-4)
    weight, _ = affine_from_running_stats(norm, 1)
    torch.testing.assert_close(weight, torch.ones(4, dtype=torch.float64))


def test_zero_variance_stays_finite() -> None:
    norm = nn.BatchNorm2d(4)
    norm.running_var.zero_()
    norm.running_mean.normal_()
    weight, bias = affine_from_running_stats(norm, 1)
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()


def test_trained_means_that_statistics_have_moved() -> None:
    assert not is_trained(nn.BatchNorm2d(3))
    assert not is_trained(nn.BatchNorm2d(3, track_running_stats=False))
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(4, 3, 2, 2))
    assert is_trained(norm)
