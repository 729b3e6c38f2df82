"""A distillation keeps nothing that is worse than the start by the teacher's class or the divergence."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler import distill, output_loss, transform
from pn_compiler.running.losses import agreement, divergence
from pn_compiler.testing import randomize_batch_norms


class Fixed(nn.Module):
    """Gives the same logits for every sample; `p` moves them from `start` to `end`."""

    def __init__(self, start: list[float], end: list[float]) -> None:
        super().__init__()
        self.register_buffer("start", torch.tensor(start))
        self.register_buffer("end", torch.tensor(end))
        self.p = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(self.start, self.end, self.p).expand(len(x), -1)


def teacher_of(logits: list[float]) -> nn.Module:
    teacher = Fixed(logits, logits)
    return teacher.requires_grad_(requires_grad=False)


def measured(student: nn.Module, teacher: nn.Module) -> tuple[float, float, bool]:
    """Loss at temperature 4, divergence at temperature 1, and whether the class is the teacher's."""
    x = torch.zeros(1, 1)
    with torch.no_grad():
        s, t = student(x), teacher(x)
    divergence = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="sum", log_target=True)
    return float(output_loss(s, t)), float(divergence), bool((s.argmax() == t.argmax()).item())


# teacher, where the student starts, and where the loss at temperature 4 leads it
WORSE = {
    "class": ([4.0, 3.9, -20.0, -20.0], [4.0, 3.5, -2.0, -2.0], [3.8, 3.95, -19.0, -19.0]),
    "divergence": ([4.0, 0.0, -20.0, -20.0], [4.0, 0.1, -8.0, -8.0], [4.0, 2.5, -20.0, -20.0]),
}


@pytest.mark.parametrize("what", WORSE)
def test_a_lower_loss_is_not_kept_at_the_cost_of(what: str) -> None:
    """The loss at temperature 4 is ruled by classes that are out of the question."""
    logits, start, end = WORSE[what]
    teacher, student = teacher_of(logits), Fixed(start, end)
    begin = measured(student, teacher)
    finish = measured(Fixed(end, end), teacher)
    assert finish[0] < begin[0]
    assert finish[2] < begin[2] if what == "class" else finish[1] > begin[1]
    result, report = distill(student, teacher, torch.zeros(20, 1), steps=60, lr=0.05)
    after = measured(result, teacher)
    assert after[1] <= begin[1]
    assert after[2] >= begin[2]
    assert report.agreement_after is not None
    assert report.agreement_before is not None
    assert report.agreement_after >= report.agreement_before
    assert report.divergence_before == pytest.approx(begin[1], rel=1e-4)
    assert report.divergence_after == pytest.approx(after[1], rel=1e-4)
    assert f"KL divergence {report.divergence_before:.2g} -> {report.divergence_after:.2g} nats" in str(
        report
    )
    # with a loss of one's own, that decides
    result, _ = distill(student, teacher, torch.zeros(20, 1), steps=60, lr=0.05, loss=output_loss)
    kept = measured(result, teacher)
    assert kept[0] < begin[0]
    assert kept[1] > begin[1] or kept[2] < begin[2]


@pytest.mark.parametrize("lr", [5e-4, 0.5])
@pytest.mark.parametrize("anchor", [0.5, 0.75, 1.0])
def test_a_network_that_is_nearly_right_does_not_become_worse(anchor: float, lr: float) -> None:
    """By the returned network itself, on the samples that are held out."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
        nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    randomize_batch_norms(net).eval()
    x = torch.randn(60, 3, 9, 9)
    start = transform(net, norm="rms", anchor=anchor).eval()
    student, report = distill(start, net, x, steps=30, lr=lr, held_out=0.5, seed=3)
    held = x[torch.randperm(60, generator=torch.Generator().manual_seed(3))[:30]]
    with torch.no_grad():
        expected, before, after = (model(held) for model in (net, start, student.eval()))
    assert divergence(after, expected) <= divergence(before, expected) + 1e-9
    assert agreement(after, expected) >= agreement(before, expected)
    assert report.steps == 30
    if anchor < 1:
        assert report.best_step > 0
        assert report.divergence_after < report.divergence_before
