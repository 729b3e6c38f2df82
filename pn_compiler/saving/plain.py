"""Inputs and records of a conversion as plain data, and back from a file that may hold anything."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pn_compiler.base.diagnostics import CODES, Diagnostic, Site
from pn_compiler.base.errors import LoadError
from pn_compiler.running.inputs import Inputs

_LARGEST = 2**40  # elements of a tensor without values
_SCALARS = (bool, int, float, str, type(None))
#: What a site says besides its structure, and the types of it.
_REMARKS: dict[str, tuple[type, ...]] = {
    "code": (str, type(None)), "reason": (str,), "warm_start": (bool,), "residual": (float, type(None)),
    "error": (float, type(None)), "anchor": (float,),
}  # fmt: skip
_SHAPE = ("name", "kind", "norm", "num_groups")


def require(condition: bool, what: str) -> None:
    """Raises LoadError, which says `what` a file holds, unless `condition`."""
    if not condition:
        raise LoadError(f"holds {what}")


def is_plain(value: object) -> bool:
    """Whether `value` is a number, text, bool or None, or a list, tuple or dict of such."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))  # type: ignore[call-overload]  # a list or tuple
    if type(value) is dict:
        return all(type(key) in _SCALARS and is_plain(item) for key, item in value.items())
    return type(value) in _SCALARS


def checked_size(size: Any) -> tuple[int, ...]:
    """`size` as the shape of a tensor. Raises LoadError if it is none."""
    fine = isinstance(size, list | tuple) and all(type(n) is int and 0 <= n < _LARGEST for n in size)
    require(fine and math.prod(size) < _LARGEST, f"the impossible shape {str(size)[:60]}")
    return tuple(size)


# Inputs --------------------------------------------------------------------------------------------


def plain_inputs(inputs: Inputs | None) -> list[Any] | None:
    """`inputs` without values. Raises ValueError if they hold something else than tensors and plain data."""
    return None if inputs is None else [_plain(tuple(inputs.args)), _plain(dict(inputs.kwargs))]


def _plain(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return ["tensor", [*value.shape], str(value.dtype).removeprefix("torch.")]
    if type(value) in (tuple, list):
        return [type(value).__name__, [_plain(item) for item in value]]
    if type(value) is dict and all(type(key) in _SCALARS for key in value):
        return ["dict", [[key, _plain(item)] for key, item in value.items()]]
    if type(value) in _SCALARS:
        return ["value", value]
    raise ValueError(f"an argument of type {type(value).__name__}")


def inputs_from(plain: Any) -> Inputs | None:
    """What `plain_inputs` wrote, on the meta device. Raises LoadError if it is something else."""
    if plain is None:
        return None
    require(type(plain) is list and len(plain) == 2, "inputs of an unknown form")
    args, kwargs = map(_from_plain, plain)
    require(type(args) is tuple and type(kwargs) is dict, "inputs of an unknown form")
    require(all(type(name) is str for name in kwargs), "inputs without a name")
    return Inputs(args, kwargs)


def _from_plain(plain: Any) -> Any:
    require(type(plain) is list and len(plain) in (2, 3), "inputs of an unknown form")
    kind, content, *rest = plain
    if kind == "tensor" and len(rest) == 1:
        return torch.empty(checked_size(content), dtype=_dtype(rest[0]), device="meta")
    require(not rest and kind in ("tuple", "list", "dict", "value"), "inputs of an unknown form")
    if kind == "value":
        require(type(content) in _SCALARS, "inputs of an unknown form")
        return content
    require(type(content) is list, "inputs of an unknown form")
    if kind == "dict":
        require(all(type(item) is list and len(item) == 2 for item in content), "inputs of an unknown form")
        require(all(type(key) in _SCALARS for key, _ in content), "inputs of an unknown form")
        return {key: _from_plain(item) for key, item in content}
    items = [_from_plain(item) for item in content]
    return tuple(items) if kind == "tuple" else items


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise LoadError(f"holds inputs of the unknown dtype {str(name)[:60]}")
    return dtype


# Sites and notes -----------------------------------------------------------------------------------


def plain_sites(sites: Sequence[Site]) -> list[dict[str, Any]]:
    return [{name: getattr(site, name) for name in (*_SHAPE, *_REMARKS)} for site in sites]


def sites_from(plain: Any, rebuilt: Sequence[Site]) -> tuple[Site, ...]:
    """The sites of a network that was `rebuilt`, with the remarks that a file holds.

    Raises:
        LoadError: the file is about other sites.
    """
    require(type(plain) is list and len(plain) == len(rebuilt), "other sites than its architecture has")
    found = []
    for item, site in zip(plain, rebuilt, strict=True):
        require(type(item) is dict and item.keys() == {*_SHAPE, *_REMARKS}, "sites of an unknown form")
        for name in _SHAPE:
            require(item[name] == getattr(site, name), f"another site than {site.name} of its architecture")
        remarks = {name: item[name] for name in _REMARKS}
        require(all(type(remarks[name]) in kinds for name, kinds in _REMARKS.items()), "strange sites")
        require(remarks["code"] is None or remarks["code"] in CODES, "sites with an unknown code")
        found.append(dataclasses.replace(site, **remarks))
    return tuple(found)


def plain_notes(notes: Sequence[Diagnostic]) -> list[list[str]]:
    return [[note.code, note.site, note.message, note.hint] for note in notes]


def notes_from(plain: Any) -> tuple[Diagnostic, ...]:
    """What `plain_notes` wrote. Raises LoadError if it is something else."""
    require(type(plain) is list, "strange notes")
    for item in plain:
        fine = type(item) is list and len(item) == 4 and all(type(part) is str for part in item)
        require(fine and item[0] in CODES, "strange notes")
    return tuple(Diagnostic(*item) for item in plain)


def by_name(plain: Any, what: str) -> Mapping[str, Any]:
    """`plain`, if it is a dictionary with names. Raises LoadError if it is not."""
    require(isinstance(plain, dict) and all(type(name) is str for name in plain), f"strange {what}")
    found: Mapping[str, Any] = plain
    return found


def names_in(plain: Any, what: str) -> frozenset[str]:
    """`plain`, if it is a list of names. Raises LoadError if it is not."""
    require(type(plain) is list and all(type(name) is str for name in plain), f"strange {what}")
    return frozenset(plain)
