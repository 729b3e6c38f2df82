"""Where the weights are among what a training run stores."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pn_compiler.base.errors import LoadError
from pn_compiler.loading.weight_names import is_averaged

_DEEPEST = 5  # nested dictionaries
_LISTED = 12  # keys in a message
#: Entries that hold tensors, but not those of the network.
_NO_WEIGHTS = re.compile(
    r"optim|sched|scaler|callback|hyper|hparam|random|config|cfg|metric|loss|criterion|history"
    r"|(^|_)(args?|rng|loops?)(_|$)",
    re.IGNORECASE,
)
_USUAL = re.compile(
    r"(model_?)?state(_?dict)?(_model)?|model|net(work)?|weights|params|module", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """Weights in a checkpoint.

    Attributes:
        values: a state_dict, or a module.
        place: the keys that lead there; none if the file holds nothing else.
    """

    values: dict[Any, Any] | nn.Module
    place: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """As the user writes it."""
        return ".".join(self.place)

    @property
    def is_averaged(self) -> bool:
        return is_averaged(self.key)


def find_weights(loaded: Any) -> list[Weights]:
    """All weights in what a file holds, those to prefer first: averaged ones, then under the usual names.

    Averages are what training runs evaluate and publish. What optimizers, schedulers and the like keep does
    not count.
    """
    found = list(_walk(loaded, ()))
    return sorted(found, key=_rank)  # stable: else the order of the file


def weights_at(loaded: Any, key: str) -> tuple[Weights, str]:
    """(the weights under the dotted `key`; the rest of it, a prefix of names in them).

    Raises:
        LoadError: there are none.
    """
    value, place, rest = loaded, [], key.split(".")
    while rest and isinstance(value, Mapping) and not _is_state(value):
        # a key may have dots of its own
        ends = (end for end in range(len(rest), 0, -1) if ".".join(rest[:end]) in value)
        end = next(ends, None)
        if end is None:
            raise LoadError(f"has no {key!r}: {_keys(value)}")
        place.append(".".join(rest[:end]))
        value, rest = value[place[-1]], rest[end:]
    prefix = "".join(f"{part}." for part in rest)
    if isinstance(value, nn.Module) and not rest:
        return Weights(value, tuple(place)), ""
    if not _is_state(value):
        found = find_weights(value)
        if not found:
            raise LoadError(f"holds no weights under {key!r}, but {_kind(value)}")
        return dataclasses.replace(found[0], place=(*place, *found[0].place)), ""
    if prefix and not any(str(name).startswith(prefix) for name in value):
        raise LoadError(f"has no {key!r}: {_keys(value)}")
    return Weights(_as_dict(value), tuple(place)), prefix


def without_weights(loaded: Any) -> str:
    """Says what a file holds that has no weights."""
    hint = "" if not isinstance(loaded, Mapping) or not loaded else "; no entry is a state_dict or a module"
    return f"holds {_kind(loaded)}, neither a module nor a state_dict{hint}"


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} without weights ({_keys(value)})"
    return f"a {type(value).__name__}"


def _keys(value: Mapping[Any, Any]) -> str:
    """The keys of a dictionary, and what is under them."""
    if not value:
        return "it is empty"
    listed = [f"{str(key)[:60]!r}: {type(item).__name__}" for key, item in list(value.items())[:_LISTED]]
    more = f" and {len(value) - _LISTED} more" if len(value) > _LISTED else ""
    return f"its keys are {', '.join(listed)}{more}"


def _walk(value: Any, place: tuple[str, ...]) -> Iterator[Weights]:
    if isinstance(value, nn.Module):
        yield Weights(value, place)
    elif isinstance(value, Mapping) and _is_state(value):
        yield Weights(_as_dict(value), place)
    elif isinstance(value, Mapping) and len(place) < _DEEPEST and "param_groups" not in value:
        for key, item in value.items():
            if isinstance(key, str) and not _NO_WEIGHTS.search(key):
                yield from _walk(item, (*place, key))


def _as_dict(value: Mapping[Any, Any]) -> dict[Any, Any]:
    return value if isinstance(value, dict) else dict(value)  # that of a module has metadata


def _is_state(value: Any) -> bool:
    """Whether a dictionary is a state_dict: tensors under their names, perhaps beside plain values."""
    if not isinstance(value, Mapping):
        return False
    tensors = [key for key, item in value.items() if isinstance(item, Tensor)]
    if not tensors or len(tensors) == len(value):
        return bool(tensors)
    nested = any(isinstance(item, Mapping | nn.Module) for key, item in value.items() if "." not in str(key))
    return not nested and all(isinstance(key, str) for key in value) and any("." in key for key in tensors)


def _rank(weights: Weights) -> tuple[bool, bool]:
    usual = all(_USUAL.fullmatch(key) for key in weights.place)
    return not weights.is_averaged, not usual
