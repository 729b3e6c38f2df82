"""The assertions themselves: what is wrong must not pass."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pn_compiler.base.errors import first_line
from pn_compiler.export import relative_error as array_error
from pn_compiler.testing import assert_batch_independent, assert_same_outputs, relative_error

ONE = torch.ones(2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("tolerance", [None, 1.0])
def test_values_that_are_not_finite_fail_in_every_tensor(bad: float, place: int, tolerance: float) -> None:
    outputs = [ONE, ONE, ONE]
    outputs[place] = torch.tensor([1.0, bad])
    for actual, expected in ((outputs, [ONE] * 3), ([ONE] * 3, outputs), (outputs, outputs)):
        with pytest.raises(AssertionError):
            assert_same_outputs(actual, expected, tolerance=tolerance)
    assert relative_error(outputs, [ONE] * 3) == float("inf")


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([], []),  # nothing is compared
        ([ONE], [ONE, ONE]),
        (ONE, torch.ones(1, 2)),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True]), torch.tensor([False])),
        ([ONE, 3], [ONE, 4]),
        ([ONE, None], [ONE, 0]),
        ([ONE.half(), ONE + 1e-3], [ONE, ONE]),  # the dtype of the first is not that of the second
        (torch.tensor([1 + 1j]), torch.tensor([1 + 2j])),
        (torch.ones(0, 2), torch.ones(0, 3)),
    ],
)
def test_other_outputs_fail(actual: Any, expected: Any) -> None:
    with pytest.raises(AssertionError):
        assert_same_outputs(actual, expected)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.ones(0, 2), torch.ones(0, 2)),
        ([ONE, torch.ones(0)], [ONE, torch.ones(0)]),
        (torch.tensor([1, 2]), torch.tensor([1, 2])),
        ({"a": ONE, "n": 3, "none": None}, {"a": ONE, "n": 3, "none": None}),
        (ONE, ONE.double() + 1e-7),
        ([ONE, ONE.half() + 1e-3], [ONE, ONE]),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 1j])),
    ],
)
def test_equal_outputs_pass(actual: Any, expected: Any) -> None:
    assert_same_outputs(actual, expected)


class Mixes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x - x.mean(0), 3


def test_batch_independence_needs_batch_mates() -> None:
    assert_batch_independent(nn.Identity(), torch.randn(2, 3))
    for x in (torch.randn(2, 3), torch.randn(1, 3)):
        with pytest.raises(AssertionError):
            assert_batch_independent(Mixes(), x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_arrays_that_cannot_be_compared_are_infinitely_far_off(bad: float) -> None:
    one = np.ones(2, np.float32)
    wrong = np.array([1, bad], np.float32)
    for actual, expected in ((wrong, one), (one, wrong), (wrong, wrong), (one, one[:1])):
        assert array_error(actual, expected) == np.inf
    assert array_error(one, np.ones(2, np.int64)) == np.inf
    assert array_error(one, one.astype(np.float64)) == 0
    assert array_error(one[:0], one[:0]) == 0


def test_first_line_of_an_error_without_a_message_is_its_type() -> None:
    assert first_line(AssertionError()) == "AssertionError"
    assert first_line(ValueError("\n  two\nlines")) == "two"
