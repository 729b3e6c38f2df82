"""What loading leaves to those who can convert: files of `pn_compiler.save`, and converted weights."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from pn_compiler.graph.provenance import OPTIONS
from pn_compiler.running.inputs import Inputs

MARK = "pn_compiler.saved"  # the entry that a file of `pn_compiler.save` begins with
_OF_SITES = (".proxy_weight", ".population_var")
_OF_BATCH_NORM = ".running_mean"


class Rebuild(Protocol):
    """Builds converted networks."""

    def network(self, saved: Mapping[str, Any]) -> tuple[nn.Module, Inputs | None]:
        """The network in a file of `pn_compiler.save`, and inputs for it. Raises LoadError."""

    def architecture(self, model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        """`model`, converted like the network whose weights are `state`. Raises LoadError."""


def is_saved(loaded: Any) -> bool:
    """Whether a file holds what `pn_compiler.save` writes."""
    return isinstance(loaded, dict) and MARK in loaded


def recorded_options(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of the conversion in the metadata of a state_dict; None if there are none."""
    metadata = getattr(state, "_metadata", None)
    for entry in metadata.values() if isinstance(metadata, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get(OPTIONS), dict):
            return dict(entry[OPTIONS])
    return None


def is_converted_state(state: Mapping[str, Any], expected: Iterable[str]) -> bool:
    """Whether `state` holds weights of a converted network, and `expected` are names in the original one."""
    names = [str(name) for name in state]
    if any(name.endswith(_OF_BATCH_NORM) for name in names):
        return False
    if recorded_options(state) is not None or any(name.endswith(_OF_SITES) for name in names):
        return True
    known = set(expected)
    norms = [name.removesuffix(_OF_BATCH_NORM) for name in known if name.endswith(_OF_BATCH_NORM)]
    weights = [f".{norm}.weight" for norm in norms if f"{norm}.weight" in known]
    return bool(norms) and all(any(f".{name}".endswith(weight) for name in names) for weight in weights)
