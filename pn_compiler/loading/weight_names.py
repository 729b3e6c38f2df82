"""From the names in a checkpoint to those of a network: wrappers put prefixes before and between them."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pn_compiler.base.errors import LoadError

_COMPILED = frozenset(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
_PARALLEL = _COMPILED | {"module"}
_COUNTERS = ("total_ops", "total_params")  # that thop leaves in every module
#: What networks are held as by those that train, average or wrap them.
_WRAPPERS = _PARALLEL | frozenset(
    ["model", "net", "network", "backbone", "base_model", "student", "teacher", "ema", "ema_model",
     "model_ema", "averaged_model", "swa_model", "trunk", "encoder", "body", "self", "forward_module"]
)  # fmt: skip
_CERTAIN = 10  # entries that all fit under one prefix, whatever it is called, are no coincidence
_AVERAGED = re.compile(r"(^|[_.\W])(ema|averaged?|averaging|swa|shadow|polyak)([_.\W]|$)", re.IGNORECASE)
_MOST_LISTED = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Renamed:
    """Weights under the names of a network.

    Attributes:
        state: name in the network -> value.
        prefix: what was removed before all names.
        others: prefixes under which there are weights that fit, too.
        left: entries that are not the network's: names in the checkpoint.
    """

    state: dict[str, Any]
    prefix: str = ""
    others: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def rename_weights(
    state: Mapping[str, Any], expected: Iterable[str], preferred: str | None = None
) -> Renamed | None:
    """`state` under the names of a network, whatever it was wrapped in when it was saved.

    Args:
        state: a state_dict whose names may have prefixes of wrappers, in any order and number, and of the
            network that it was a part of; and entries of other parts.
        expected: names in the network. Counters of batches may be missing.
        preferred: the prefix to take, if several fit.

    Returns:
        The entries that belong to the network; None if some are missing under every prefix.

    Raises:
        LoadError: different weights fit under several prefixes.
    """
    names = set(expected)
    required = {name for name in names if not name.endswith("num_batches_tracked")}
    for lead in _leads(required):
        inner = [name.removeprefix(lead) for name in required]
        for variant in _variants(state):
            prefixes = _prefixes(variant, inner)
            if preferred is not None:
                prefixes = [prefix for prefix in prefixes if prefix.startswith(preferred)]
            elif len(required) < _CERTAIN:
                prefixes = [prefix for prefix in prefixes if _is_wrapper(lead) and _is_wrapper(prefix)]
            if prefixes:
                prefix = _choose(prefixes, {name: state[was] for name, was in variant.items()}, inner)
                others = tuple(other for other in prefixes if other != prefix)
                return _renamed(variant, state, Renamed({}, prefix, others), lead, names)
    return None


def _renamed(
    variant: Mapping[str, Any], state: Mapping[Any, Any], choice: Renamed, lead: str, names: set[str]
) -> Renamed:
    """`choice` with the entries below its prefix, under names that begin with `lead`."""
    result: dict[str, Any] = {}
    left: list[str] = []
    for name, was in variant.items():
        inner = lead + name.removeprefix(choice.prefix)
        counter = inner.rpartition(".")[2] in _COUNTERS and inner not in names
        foreign = not name.startswith(choice.prefix) or (not choice.prefix and name.startswith(choice.others))
        if foreign or counter or not isinstance(state[was], Tensor):
            left.append(name)
        else:
            result[inner] = state[was]
    return dataclasses.replace(choice, state=result, left=tuple(left))


def _variants(state: Mapping[Any, Any]) -> Iterator[Mapping[str, Any]]:
    """Name -> name in `state`: first as they are, then without wrappers within them."""
    yield {str(name): name for name in state}
    for wrappers in (_COMPILED, _PARALLEL):
        short = {_without(str(name), wrappers): name for name in state}
        if len(short) == len(state):
            yield short


def _without(name: str, wrappers: frozenset[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _leads(required: set[str]) -> Iterator[str]:
    """Prefixes that all names of the network itself have: none, then longer ones."""
    yield ""
    lead = ""
    while required:
        first, dot, _ = next(iter(required)).removeprefix(lead).partition(".")
        lead += first + dot
        if not dot or not all(name.startswith(lead) for name in required):
            return
        yield lead


def _is_wrapper(prefix: str) -> bool:
    return all(part in _WRAPPERS for part in prefix.split(".")[:-1])


def _prefixes(names: Iterable[str], required: Iterable[str]) -> list[str]:
    """All prefixes under which `names` has everything required, the empty one first."""
    present, wanted = set(names), list(required)
    anchor = max(wanted, key=len, default=None)
    if anchor is None:
        return [""]
    ends = dict.fromkeys(name.removesuffix(anchor) for name in names if name.endswith(f".{anchor}"))
    return [prefix for prefix in ("", *ends) if all(prefix + name in present for name in wanted)]


def _choose(prefixes: Sequence[str], state: Mapping[str, Any], required: Iterable[str]) -> str:
    """The prefix to take: the averaged one, or none, or any if all hold the same.

    Raises:
        LoadError: they hold different weights.
    """
    averaged = [prefix for prefix in prefixes if is_averaged(prefix)]
    first, *others = averaged or prefixes
    if not first:
        return first
    for name in required:
        if any(not _equal(state[first + name], state[other + name]) for other in others):
            listed = ", ".join(prefix.removesuffix(".") or "(none)" for prefix in prefixes[:_MOST_LISTED])
            raise LoadError(f"holds different weights that fit, under {listed}: choose with --checkpoint-key")
    return first


def _equal(one: Any, other: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return one is other or (both and one.shape == other.shape and torch.equal(one, other))


def is_averaged(name: str) -> bool:
    """Whether what is stored under `name` is an average over the training."""
    return bool(_AVERAGED.search(name))
