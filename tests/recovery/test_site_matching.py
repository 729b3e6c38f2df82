"""The distance between the sites of a conversion and the BatchNorms of the original."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler.recovery.site_matching import SiteMatching
from pn_compiler.running.inputs import Inputs
from pn_compiler.testing import randomize_batch_norms

X = torch.randn(6, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Ends of branches, an activation in place, a BatchNorm called by keyword, another called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.bn1(self.conv1(x)))
        x = x + self.bn2(input=self.conv2(x))
        return x + self.bn2(self.conv2(x))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.SiLU(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip


def trained(make) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(make()).eval().double()


def distance(student: nn.Module, teacher: nn.Module) -> tuple[float, Tensor]:
    sites = SiteMatching(student, teacher)
    sites.observe_teacher(Inputs((X,)))
    with sites.comparing():
        output = student(X)
    found = sites.distance()
    assert found is not None
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for net in (student, teacher) for m in net.modules()
    )
    return found, output


def relative(actual: Tensor, expected: Tensor) -> Tensor:
    return (actual - expected).square().mean() / expected.var(correction=0)


@pytest.mark.parametrize("proxy", [True, False])
def test_the_distance_is_that_of_each_site_on_its_own_input(proxy: bool) -> None:
    """Against both networks by hand; proxy normalization changes nothing in what a site normalizes."""
    net = trained(plain)
    student = pn_compiler.transform(net, proxy=proxy).eval()
    plain_student = pn_compiler.transform(net, proxy=False).eval()
    found, output = distance(student, net)
    with torch.no_grad():
        a, b = net[0](X), plain_student.get_submodule("0")(X)
        t1, s1 = net[1](a), plain_student.get_submodule("1")(b)
        t2, s2 = net[4](net[3](t1.relu())), plain_student.get_submodule("4")(net[3](s1.relu()))
        expected = (relative(s1, t1) + relative(s2, t2)) / 2
        torch.testing.assert_close(found.detach(), expected, rtol=1e-8, atol=0)
        torch.testing.assert_close(output, plain_student(X))
    found.backward()
    assert student.get_parameter("0.weight").grad is not None


def test_ends_of_branches_and_both_calls_of_a_module() -> None:
    net = trained(Residual)
    student = pn_compiler.transform(net).eval()
    found, _ = distance(student, net)
    alone = pn_compiler.transform(net, proxy=False).eval()
    with torch.no_grad():
        s, t = alone.bn1(alone.conv1(X)), net.bn1(net.conv1(X))
        terms = [relative(s, t)]  # without proxy normalization
        s, t = F.relu(s), F.relu(t)
        for _ in range(2):
            s2, t2 = alone.bn2(alone.conv2(s)), net.bn2(net.conv2(t))
            terms.append(relative(s2, t2))
            s, t = s + s2, t + t2
    torch.testing.assert_close(found.detach(), sum(terms) / 3, rtol=1e-8, atol=0)


def test_there_is_nothing_to_compare() -> None:
    net = trained(plain)
    assert not SiteMatching(net, net)
    assert not SiteMatching(pn_compiler.transform(net), nn.Sequential(nn.Conv2d(3, 4, 5)))
    without = copy.deepcopy(net)
    for index in (1, 4):
        without[index].running_mean = without[index].running_var = None
    assert not SiteMatching(pn_compiler.transform(net), without)
