"""What a converted network remembers of its conversion, so that it can be repeated without its code."""

import dataclasses
import io
import pickle
from collections.abc import Mapping
from typing import Any

from torch import nn

from pn_compiler.running.inputs import Inputs

OPTIONS = "pn_compiler.options"  # key in the metadata of a state_dict


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Provenance:
    """How a network was converted.

    Attributes:
        options: arguments of `pn_compiler.transform`, as plain data.
        structure: the original network on the meta device; None if it cannot be copied or pickled.
        inputs: the example that it was traced with, on the meta device, or None.
    """

    options: Mapping[str, Any]
    structure: nn.Module | None
    inputs: Inputs | None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Provenance":
        return self  # nothing changes it

    def __reduce__(self) -> tuple[Any, ...]:
        return Provenance, (dict(self.options), picklable_or_none(self.structure), self.inputs)


def picklable_or_none(module: nn.Module | None) -> nn.Module | None:
    """`module`; None if pickle refuses it, as it does those of a class that was defined in a function."""
    try:
        pickle.Pickler(io.BytesIO()).dump(module)
    except Exception:  # the code of any class may run, and fail
        return None
    return module
