"""What the teacher's BatchNorms give is computed once, and nothing changes by it but time."""

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler import distill
from pn_compiler.data.samples import Samples
from pn_compiler.recovery import site_targets
from pn_compiler.recovery.site_matching import SiteMatching
from pn_compiler.recovery.site_targets import SiteTargets
from pn_compiler.testing import randomize_batch_norms


class Residual(nn.Module):
    """A BatchNorm that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv(x)).relu()
        x = x + self.bn2(x)
        return (x + self.bn2(x)).mean((2, 3))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(Residual()).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(1))


SEEN: list[int] = []  # sizes of batches; a list of the module itself would be restored


class Counted(nn.Module):
    """Notes the sizes of its batches."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        SEEN.clear()
        self.bn1, self.bn2, self.net = net.bn1, net.bn2, net

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(len(x))
        return self.net(x)


def test_they_are_those_of_the_samples_that_are_asked_for(net: nn.Module) -> None:
    x = images(20)
    sites = SiteMatching(pn_compiler.transform(net, norm="layer"), net)
    samples = Samples.read(x, net, 20)
    sites._teacher = Counted(net)
    targets = SiteTargets(sites, samples, torch.arange(2, 20).split(5) * 2)
    assert sum(SEEN) == 18
    rows = torch.tensor([7, 3, 19])
    targets.load(rows)
    assert sum(SEEN) == 18
    kept = sites.targets
    sites.observe_teacher(samples.inputs(rows.tolist()))
    assert [len(calls) for calls in kept] == [len(calls) for calls in sites.targets]
    assert sum(len(calls) for calls in kept) in (2, 3)
    for own, fresh in zip(kept, sites.targets, strict=True):
        for (actual, _), (expected, _) in zip(own, fresh, strict=True):
            torch.testing.assert_close(actual.float(), expected, rtol=1e-3, atol=1e-3)
    sites.observe_teacher(samples.inputs(range(2, 20)))
    for own, whole in zip(kept, sites.targets, strict=True):
        for (_, actual), (_, expected) in zip(own, whole, strict=True):
            assert actual == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("why", ["memory", "range", "batches"])
def test_they_are_computed_anew_where_they_cannot_be_kept(
    why: str, net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "memory":
        monkeypatch.setattr(site_targets, "_KEPT_BYTES", 1000)
    if why == "range":  # of float16
        with torch.no_grad():
            net.bn2.bias.fill_(1e6)
    sites = SiteMatching(pn_compiler.transform(net, norm="layer"), net)
    x = images(12)
    batches = [x[:6, :, :7], x[6:]] if why == "batches" else x
    samples = Samples.read(batches, net, 12)
    assert samples.whole == (why == "batches")
    targets = SiteTargets(sites, samples, torch.arange(len(samples)).split(6) * 2)
    rows = torch.tensor([1]) if samples.whole else torch.tensor([1, 5])
    targets.load(rows)
    actual = sites.targets
    sites.observe_teacher(samples.inputs(rows.tolist()))
    for own, fresh in zip(actual, sites.targets, strict=True):
        assert all(torch.equal(a, e) for (a, _), (e, _) in zip(own, fresh, strict=True))


def test_a_distillation_runs_its_teacher_twice_for_each_sample(net: nn.Module) -> None:
    """Once for its outputs, once for the sites; however many steps there are."""
    converted = pn_compiler.transform(net, norm="layer")
    counts = []
    for steps in (4, 12):
        distill(converted, Counted(net), images(40), steps=steps, batch_size=16)
        counts.append(sum(SEEN))
    assert counts[0] == counts[1]
    distill(converted, Counted(net), images(40), steps=1, batch_size=4)  # fewer samples than there are
    assert sum(SEEN) < counts[0]
