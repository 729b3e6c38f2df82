"""Files like those of pn_compiler.save, broken or hostile."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import pn_compiler
from pn_compiler.graph.graph_module import provenance
from pn_compiler.loading.rebuilding import MARK
from pn_compiler.saving.contents import contents_of
from tests.security.files import CANARY, COMPILE, LOADS, Case, Payload, entries, network, packed, saved

_UNKNOWN = "holds |cannot be converted"


def saved_cases() -> Iterator[Case]:
    yield Case("saved_good.pt", saved(_plain()), LOADS, (), COMPILE)
    for name, change, expected in _CHANGES:
        yield _case(name, change, expected)
    for key in _plain():
        if key != MARK:
            yield _case(f"without_{key}", functools.partial(_drop, key=key), "holds ")
        for kind, value in _VALUES.items():
            if (key, kind) != ("version", "text"):
                yield _case(f"{key}_{kind}", functools.partial(_put, key=key, value=value), "holds ")
    content = saved(_plain())
    for share in (0.3, 0.9):
        yield Case(f"saved_cut_{share}.pt", content[: int(len(content) * share)], "damaged", ())
    spoilt = entries(content)
    name = max(spoilt, key=lambda name: len(spoilt[name]) if "/data/" in name else 0)
    spoilt[name] = spoilt[name][:-4]
    yield Case("saved_short_tensor.pt", packed(spoilt), "missing or cut short", ())


def _drop(plain: dict[str, Any], key: str) -> None:
    del plain[key]


def _put(plain: dict[str, Any], key: str, value: Any) -> None:
    plain[key] = value


def _case(name: str, change: Callable[[dict[str, Any]], Any], expected: str) -> Case:
    plain = _plain()
    change(plain)
    return Case(f"saved_{name}.pt", saved(plain), expected, ())


@functools.cache
def _conversion() -> nn.Module:
    return pn_compiler.transform(network(), torch.randn(1, 3, 8, 8))


def _plain() -> dict[str, Any]:
    model = _conversion()
    origin = provenance(model)
    assert origin is not None
    return contents_of(model, origin).to_plain()


def _options(**options: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain["options"].update(options)


def _larger(plain: dict[str, Any]) -> None:
    plain["tensors"]["0.weight"] = torch.zeros(5, 3, 3, 3)


def _of_half(plain: dict[str, Any]) -> None:
    plain["tensors"]["0.weight"] = plain["tensors"]["0.weight"].long()


def _shape(*size: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain["shapes"].update({"0.weight": [*size]})


def _module(path: str, module: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain["modules"].update({path: module})


def _value(path: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain["values"].update({path: {name: value}})


def _site(**remarks: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain["sites"][0].update(remarks)


def _inputs(*plain_inputs: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain.update(inputs=[["tuple", [*plain_inputs]], ["dict", []]])


_VALUES: dict[str, Any] = {
    "number": 7,
    "text": "x",
    "module": nn.ReLU(),
    "names": {"a": 1},
    "list": [[1], "b"],
}
_RUNS = Payload(print, "hostile")
_CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("calls", lambda plain: plain.update(more=Payload(os.system, CANARY)), "run any code"),
    ("calls_in_options", _options(norm=_RUNS), "run any code"),
    ("calls_in_place_of_module", _module("0", _RUNS), "run any code"),
    ("graph", _module("3", torch.fx.symbolic_trace(nn.ReLU())), "source text"),
    ("later_format", lambda plain: plain.update({MARK: 2}), "later format"),
    ("other_entries", lambda plain: plain.update(more=1), "other entries"),
    ("unknown_norm", _options(norm="batch"), "norm"),
    ("norm_of_other_type", _options(norm=[1]), "norm"),
    ("unknown_option", _options(fast=True), "holds"),
    ("pipeline", _options(pipeline="os.system"), "holds"),
    ("groups_of_other_type", _options(num_groups="4"), "num_groups"),
    ("endless_groups", _options(num_groups=2**62), _UNKNOWN),
    ("no_anchor", _options(anchor={"1": "much"}), "anchor"),
    ("unknown_leaf", _options(leaves=["a.b"]), "holds"),
    ("leaf_of_other_type", _options(leaves=7), "holds"),
    ("other_norm", _options(norm="layer"), "holds"),
    ("larger_tensor", _larger, "shape"),
    ("other_kind", _of_half, "shape|holds"),
    ("missing_tensor", lambda plain: plain["tensors"].pop("0.weight"), "0.weight"),
    ("more_tensors", lambda plain: plain["tensors"].update(more=torch.ones(1)), "more"),
    ("text_for_tensor", lambda plain: plain["tensors"].update({"0.weight": "x"}), "strange tensors"),
    ("huge_shape", _shape(2**39, 3, 3, 3), "impossible shape"),
    ("large_shape", _shape(2**30, 3, 3, 3), "holds"),
    ("negative_shape", _shape(-1, 3, 3, 3), "impossible shape"),
    ("shape_of_text", _shape("4", 3), "impossible shape"),
    ("shape_of_rank", _shape(4, 3), "holds"),
    ("path_of_source", _module("0\n    import os", nn.ReLU()), "holds"),
    ("path_of_method", _module("forward", nn.ReLU()), "holds"),
    ("path_of_dunder", _module("__class__", nn.ReLU()), "holds"),
    ("path_nowhere", _module("9.a", nn.ReLU()), "holds"),
    ("site_replaced", _module("1", nn.ReLU()), "holds"),
    ("gone_nowhere", lambda plain: plain["gone"].append("9"), "holds"),
    ("value_of_registry", _value("", "_modules", {}), "attribute"),
    ("value_of_code", _value("", "_code", "import os"), "attribute"),
    ("value_of_method", _value("", "forward", 1), "attribute"),
    ("value_of_part", _value("", "_pn_part", 1), "attribute"),
    ("value_of_dunder", _value("", "__class__", 1), "attribute"),
    ("value_nowhere", _value("9", "x", 1), "holds"),
    ("strange_value", _value("0", "x", torch.ones(1)), "attribute"),
    ("site_of_other_name", _site(name="2"), "another site"),
    ("site_of_other_kind", _site(kind="skipped"), "another site"),
    ("anchor_of_text", _site(anchor="1"), "strange sites"),
    ("site_of_unknown_code", _site(code="PN999"), "unknown code"),
    ("unknown_note", lambda plain: plain.update(notes=[["PN999", "", "", ""]]), "strange notes"),
    ("input_of_other_kind", _inputs(["set", [1]]), "unknown form"),
    ("input_of_dtype", _inputs(["tensor", [1, 3, 8, 8], "os"]), "dtype"),
    ("input_of_shape", _inputs(["tensor", [2**50], "float32"]), "impossible shape"),
    ("two_inputs", _inputs(["tensor", [1], "float32"], ["tensor", [1], "float32"]), "holds"),
]  # fmt: skip
