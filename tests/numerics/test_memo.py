"""Memo: never an old value."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from pn_compiler.numerics.memo import Memo


class Doubled:
    """x -> 2 x, which counts its calls."""

    def __init__(self) -> None:
        self.memo, self.calls = Memo(), 0

    def __call__(self, x: Tensor | None, flag: bool = False) -> Tensor | None:
        def compute() -> Tensor | None:
            self.calls += 1
            return None if x is None else 2 * x

        return self.memo.recall((x, flag), compute)


def test_holds_while_the_values_are_equal() -> None:
    doubled, x = Doubled(), torch.ones(3)
    with torch.no_grad():
        first = doubled(x)
        assert doubled(x.clone()) is first
    assert doubled.calls == 1


@pytest.mark.parametrize("change", ["in place", "data", "dtype", "shape", "flag", "none", "nan"])
def test_notices_every_change(change: str) -> None:
    doubled, x, flag = Doubled(), torch.ones(3), False
    given: Tensor | None = x
    with torch.no_grad():
        doubled(x)
        if change == "in place":
            x.add_(1)
        elif change == "data":
            x.data[1] = 7  # version counters do not see it
        elif change == "dtype":
            given = x.double()
        elif change == "shape":
            given = torch.ones(4)
        elif change == "flag":
            flag = True
        elif change == "none":
            given = None
        else:
            x[0] = torch.nan
        actual = doubled(given, flag)
    assert doubled.calls == 2
    if given is not None:
        assert actual is not None
        torch.testing.assert_close(actual, 2 * given, equal_nan=True)


def test_is_off_where_gradients_are_recorded() -> None:
    doubled, x = Doubled(), torch.ones(3, requires_grad=True)
    assert doubled(x) is not doubled(x)
    with torch.no_grad():
        assert doubled(x) is doubled(x)


def test_copies_and_pickles_begin_empty() -> None:
    doubled, x = Doubled(), torch.ones(1000)
    with torch.no_grad():
        doubled(x)
    empty = len(pickle.dumps(Memo()))
    assert len(pickle.dumps(doubled.memo)) == empty
    assert copy.deepcopy(doubled.memo)._held is None
