"""Pickles with types that are admitted beside weights, in forms in which they are never written."""

import argparse
import codecs
import collections
import datetime
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.nn.functional as F

from tests.security.files import Case, changed, pickled

_REFUSED = "not what torch.save writes|can run any code"


def inert_cases() -> Iterator[Case]:
    yield from _values_beside_weights()
    yield from _nested_classes()
    yield from _calls_out_of_sight()


class Made:
    """Pickles as a call of `function` with a state."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], state: Any = None) -> None:
        self.value = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.value


def _values_beside_weights() -> Iterator[Case]:
    """Types that are admitted, in forms in which they are never written."""
    scalar, rebuild = np._core.multiarray.scalar, np._core.multiarray._reconstruct
    order = (3, "<", None, None, None, -1, -1, 0)
    f8 = Made(np.dtype, ("f8", False, True), order)
    objects = Made(np.dtype, ("O", False, True), order)
    huge, empty = (2**40,), (np.ndarray, (0,), b"b")
    dunder, method = argparse.Namespace(), argparse.Namespace()
    dunder.__dict__["__deepcopy__"] = F.relu
    method._get_kwargs = F.relu
    values = {
        "namespace_dunder": dunder,
        "namespace_method": method,
        "namespace_called": Made(argparse.Namespace, ({"a": 1},)),
        "namespace_list": Made(types.SimpleNamespace, (), [1]),
        "path_number": Made(pathlib.PosixPath, (7,)),
        "path_endless": Made(pathlib.PosixPath, ("a" * 10**6,)),
        "path_state": Made(pathlib.PosixPath, ("a",), {"_drv": "b"}),
        "date_text": Made(datetime.date, ("2024",)),
        "date_numbers": Made(datetime.date, (2024, 1, 1)),
        "zone_function": Made(datetime.timezone, (F.relu,)),
        "difference": Made(datetime.timedelta, (10**30,)),
        "scalar_object": Made(scalar, (Made(np.dtype, ("O8", False, True), order), b"12345678")),
        "scalar_short": Made(scalar, (f8, b"1234")),
        "scalar_list": Made(scalar, (f8, [1])),
        "scalar_of_no_bytes": Made(scalar, (f8, Made(codecs.encode, ()))),
        "scalar_of_nothing": Made(scalar, ()),
        "scalar_not_of_latin1": Made(scalar, (f8, Made(codecs.encode, ("12345678", "utf8")))),
        "dtype_unknown": Made(scalar, (Made(np.dtype, ("f1", False, True), order), b"1")),
        "dtype_of_nothing": Made(np.dtype, (), order),
        "dtype_short": Made(np.dtype, ("f8", False, True), (3, "<")),
        "dtype_of_fields": Made(np.dtype, ("f8,O", False, True), order),
        "dtype_of_strings": Made(np.dtype, ("S99999999", False, True), order),
        "dtype_shared": Made(np.dtype, ("f8", False, False), order),
        "dtype_state": Made(np.dtype, ("f8", False, True), (3, "<", None, ("a",), {"a": 1}, 8, 1, 0)),
        "array_object": Made(rebuild, empty, (1, (1,), objects, False, [1])),
        "array_huge": Made(rebuild, empty, (1, huge, f8, False, b"")),
        "array_allocated": Made(rebuild, (np.ndarray, huge, b"b")),
        "array_class": Made(rebuild, (collections.OrderedDict, (0,), b"b"), (1, (0,), f8, False, b"")),
        "array_made": Made(np.ndarray, (huge,)),
        "bytes": Made(bytes, (2**40,)),
        "counter": Made(collections.Counter, (2**40,)),
        "reference": bytes,
    }  # fmt: skip
    for name, value in values.items():
        yield Case(f"beside_{name}.pt", changed(lambda net, v=value: setattr(net, "extra", v)), _REFUSED)


def _nested_classes() -> Iterator[Case]:
    """``getattr`` where it does not lead to a class inside a class that the user admits."""
    for outer, inner in (
        ("pathlib.Path", "touch"), ("subprocess.Popen", "Inner"), ("torch.nn.Module", "Popen"),
        ("torch.nn.modules.module.Module", "T"), ("builtins.getattr", "Popen"),
    ):  # fmt: skip
        yield Case(
            f"getattr_{outer}_{inner}.pt", pickled(_named("builtins.getattr") + _pair(outer, inner) + b"."),
            f"{_REFUSED}|--allow|neither a|cannot be imported",
        )  # fmt: skip
    chain = _named("builtins.getattr") + _pair("tests.security.files.Payload", "Inner")
    allowed = ("--allow", "tests.security.files.Payload.Inner")
    yield Case("nested_unknown.pt", pickled(chain + b")\x81."), "cannot be imported", allowed)


def _named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"\x80\x02" + f"c{module}\n{attribute}\n".encode()


def _pair(outer: str, name: str) -> bytes:
    """The call of what lies on the stack with the object `outer` and a text."""
    return _named(outer)[2:] + _text(name) + b"\x86R"


def _text(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _calls_out_of_sight() -> Iterator[Case]:
    """Of admitted classes, where what is loaded does not hold the result."""
    call = _named("torch.nn.modules.linear.Linear")[2:] + b"\x8a\x06\0\0\0\0\0\x10" * 2 + b"\x86R"
    key = _text("a")
    places = {
        "below": b"\x80\x02" + call + b"}.",
        "overwritten": b"\x80\x02}" + key + call + b"s" + key + b"K\x01s.",
        "memo": b"\x80\x02}(" + key + call + b"q\x07" + key + b"K\x01u.",
    }
    for name, content in places.items():
        yield Case(f"unseen_{name}.pt", pickled(content), _REFUSED)
