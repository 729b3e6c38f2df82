"""Normalizers of one's own that count batches, or move their statistics by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pn_compiler
from pn_compiler.base.errors import RefusedError
from pn_compiler.testing import assert_same_outputs
from tests.passes.norm_functions import Call, Norm, X, by_hand, functional, layers


class Counting(Norm):
    """Counts its batches before it normalizes, as nn.BatchNorm does and activated norms copy from there."""

    def __init__(self, count: Callable[[Any], None]) -> None:
        super().__init__(functional)
        self.register_buffer("num_batches_tracked", torch.tensor(3))
        self.count = (count,)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count[0](self)
        return super().forward(x)


def counts(norm: Any) -> None:
    norm.num_batches_tracked += 1


def counts_in_place(norm: Any) -> None:
    norm.num_batches_tracked.add_(1)


def counts_anew(norm: Any) -> None:
    norm.num_batches_tracked = norm.num_batches_tracked + 1


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [counts, counts_in_place, counts_anew])
def test_counters_of_batches_are_dropped(count: Callable[[Any], None], training: bool, given: bool) -> None:
    net = layers(Counting(count)).train(training)
    converted = pn_compiler.transform(net, X if given else None, strict=True)
    assert [(s.name, s.kind) for s in pn_compiler.sites(converted)] == [("1", "pn")]
    expected = pn_compiler.transform(by_hand(net[1]).train(training))  # type: ignore[arg-type]
    assert_same_outputs(converted(X), expected(X))
    assert not [name for name in converted.state_dict() if "tracked" in name]
    assert net.get_buffer("1.num_batches_tracked") == 3


class Averaging(Counting):
    """Weights a batch by the number of those before."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.num_batches_tracked


@pytest.mark.parametrize("count", [counts, counts_in_place, counts_anew])
def test_counters_that_are_read_still_count(count: Callable[[Any], None]) -> None:
    net = layers(Averaging(count)).train()
    converted: Any = pn_compiler.transform(net, X)
    assert [site.code for site in pn_compiler.sites(converted)] == ["PN120"]
    for _ in range(2):
        assert_same_outputs(converted(X), net(X))
    assert converted.get_buffer("1.num_batches_tracked") == 5


def moves_the_mean(norm: Any, x: Tensor) -> Tensor:
    _, _, mean, _ = norm.tensors
    if norm.training:
        mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
    return F.batch_norm(x, *norm.tensors[2:], *norm.tensors[:2], False, 0.1, 1e-3)


def copies_the_mean(norm: Any, x: Tensor) -> Tensor:
    _, _, mean, _ = norm.tensors
    if norm.training:
        with torch.no_grad():
            mean.copy_(0.9 * mean + 0.1 * x.mean((0, 2, 3)))
    return F.batch_norm(x, *norm.tensors[2:], *norm.tensors[:2], False, 0.1, 1e-3)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("call", [moves_the_mean, copies_the_mean])
def test_statistics_kept_by_hand_are_refused(call: Call, given: bool) -> None:
    net = layers(Norm(call)).train()
    converted = pn_compiler.transform(net, X if given else None)
    assert [site.code for site in pn_compiler.sites(converted)] == ["PN120"]
    for _ in range(2):
        assert_same_outputs(converted(X), net(X))
    with pytest.raises(RefusedError, match="PN120"):
        pn_compiler.transform(net, X, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_comparison_in_train_mode_leaves_statistics_alone(dtype: torch.dtype) -> None:
    net = layers(Counting(lambda norm: None)).to(dtype).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    converted = pn_compiler.transform(net, X.to(dtype))
    assert "PN110" in {note.code for note in pn_compiler.notes(converted)}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
