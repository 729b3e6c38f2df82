"""The states of the random generators that a traced forward may draw from unnoticed."""

import random
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes


class RandomStates:
    """The states of the generators that a forward may draw from unnoticed: those of torch and NumPy."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._others: dict[int, tuple[Any, Any]] = {}  # identity -> generator, state
        numpy = sys.modules.get("numpy")
        self._kinds = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
        if numpy is not None:
            self.note(numpy.random.mtrand._rand)

    def note(self, value: Any) -> None:
        """Includes `value` if it is a NumPy generator."""
        if self._kinds and isinstance(value, self._kinds) and id(value) not in self._others:
            self._others[id(value)] = value, _bits(value).state

    def moved(self) -> str | None:
        """Says which generator has been used since, or None."""
        if any(_differs(value, state) for value, state in self._others.values()):
            return "the forward draws random numbers with NumPy"
        with _disable_current_modes():  # the state is not a fake tensor
            if not torch.equal(torch.get_rng_state(), self._torch):
                return "the forward sets or moves the random state of torch"
        return None

    def restore(self) -> None:
        """Restores all states."""
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        for value, state in self._others.values():
            if _differs(value, state):
                _bits(value).state = state


def _bits(value: Any) -> Any:
    return value._bit_generator if hasattr(value, "_bit_generator") else value.bit_generator


def _differs(value: Any, state: Any) -> bool:
    return bool(_mark(_bits(value).state) != _mark(state))


def _mark(state: Any) -> Any:
    """A fingerprint of a generator's state, to be compared by ==."""
    if isinstance(state, dict):
        return [_mark(value) for value in state.values()]
    return state.tobytes() if hasattr(state, "tobytes") else state
