"""Distillation of networks whose outputs are maps: of logits, of values, or of who knows which."""

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler import distill, output_loss, relative_l2
from pn_compiler.base.errors import ConfigError
from pn_compiler.running import losses
from pn_compiler.testing import randomize_batch_norms


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Patches of unlike contrast, so that statistics of one instance are not those of all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(640, 1, 4, 4, generator=generator).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return x * torch.rand(640, 1, 1, 1, generator=generator)


@pytest.mark.parametrize("shape", [(5, 7, 1), (5, 7, 2, 3), (5, 7, 1, 2, 2)])
def test_the_loss_of_pixels_is_that_of_samples_at_temperature_1(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    result = output_loss(s, t, "all")
    shares = losses.agreement(s, t, "all")
    monkeypatch.setattr(losses, "TEMPERATURE", 1.0)
    s, t = (x.movedim(1, -1).reshape(-1, 7) for x in (s, t))
    torch.testing.assert_close(result, output_loss(s, t))
    torch.testing.assert_close(relative_l2(s, t), output_loss(s, t, "none"))
    assert shares == losses.agreement(s, t) == float((s.argmax(1) == t.argmax(1)).double().mean())
    assert losses.agreement(s, t, "none") is None


def segmenter() -> nn.Module:
    """Images [N, 1, 8, 8] to [N, 3, 8, 8], with BatchNorm."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1),
    )  # fmt: skip
    return randomize_batch_norms(net).eval()


def test_a_segmentation_network_learns_the_class_of_each_pixel(images: Tensor) -> None:
    net = segmenter()
    converted = pn_compiler.transform(net, norm="instance")
    student, report = distill(converted, net, images[:320], steps=40, lr=5e-3, logits="all")
    assert report.loss_after < 0.5 * report.loss_before
    assert report.agreement_before is not None
    assert report.agreement_after is not None
    assert report.agreement_after > report.agreement_before + 0.02
    assert report.outputs == {"output": "logits of 3 classes"}
    with torch.no_grad():
        expected = net(images[320:]).argmax(1)
        before, after = (
            float((network(images[320:]).argmax(1) == expected).double().mean())
            for network in (converted.eval(), student)
        )
    assert report.agreement_before == pytest.approx(before, abs=0.03)
    assert after > before + 0.02


class Trap(nn.Module):
    """Two maps; as p rises they come nearer to those of the teacher, without p, as values only."""

    def __init__(self, p: float | None) -> None:
        super().__init__()
        self.p = None if p is None else nn.Parameter(torch.tensor(p))

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([x + 0.5, x - 0.5], 1)  # the first class is right everywhere
        if self.p is None:
            return maps
        return maps + 3 * (1 - self.p) + self.p * torch.tensor([-1.0, 1.0]).reshape(2, 1, 1)


def test_a_map_that_may_hold_logits_is_no_worse_as_either(images: Tensor) -> None:
    """The result is worse by the other loss only if the user says what the output holds."""
    results = {}
    for logits in ("auto", "all", "none"):
        student, report = distill(Trap(0.0), Trap(None), images[:64], steps=50, lr=0.05, logits=logits)
        results[logits] = float(student.p.detach()), report
    p, report = results["none"]
    assert p > 0.5
    assert (report.agreement_after, report.outputs) == (None, {"output": "values"})
    assert report.loss_after < 0.3 * report.loss_before
    p, report = results["all"]
    assert abs(p) < 1e-3
    assert (report.agreement_after, report.outputs) == (1, {"output": "logits of 2 classes"})
    p, report = results["auto"]
    assert abs(p) < 1e-3
    assert "output is taken for values; if it holds logits of 2 classes, say so: logits='all'" in str(report)


def test_what_holds_no_logits(images: Tensor) -> None:
    net = segmenter()
    with pytest.raises(ConfigError, match="logits='classes': expected one of 'auto', 'all', 'none'"):
        distill(net, net, images[:8], logits="classes")
    depth = nn.Sequential(net, nn.Conv2d(3, 1, 1))
    with pytest.raises(ConfigError, match=r"no output has several classes.* dim 1: output is \[1, 1, 8, 8\]"):
        distill(depth, depth, images[:8], logits="all")
    flat = nn.Sequential(net, nn.Flatten())
    _, report = distill(flat, flat, images[:8], steps=0, logits="none")
    assert (report.agreement_before, report.outputs) == (None, {"output": "values"})
