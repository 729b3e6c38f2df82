"""Checks that an exported program can be loaded without running code from its file.

``torch.export.load`` unpickles objects, loads compiled libraries, looks operators up by dotted name anywhere
below ``torch``, passes size expressions to sympy, which evaluates them, and writes names into Python source.
Here the whole file is checked first against the classes of torch's own schema: anything they do not describe,
and every text without a rule below, is refused.
"""

import dataclasses
import enum
import json
import math
import re
import types
import typing
from typing import Any

from torch._export.serde import schema, union

from pn_compiler.base.errors import LoadError
from pn_compiler.loading.archives import Archive
from pn_compiler.loading.pickle_audit import audit_pickle, fits
from pn_compiler.loading.program_arithmetic import is_bounded
from pn_compiler.loading.program_texts import KEYS, TEXTS

_ENTRY = re.compile(
    r"models/model\.json|archive_format|archive_version|byteorder|version|\.data/\w{1,40}"
    r"|extra/[\w.-]{1,200}|data/sample_inputs/model\.pt|data/(weights/weight_\d+|constants/tensor_\d+)"
    r"|data/(weights/model_weights|constants/model_constants)_config\.json"
)
_INPUTS = "data/sample_inputs/model.pt"
_PROGRAM = "models/model.json"
_PAYLOADS = {
    "data/weights/": ("data/weights/model_weights_config.json", re.compile(r"weight_\d{1,9}")),
    "data/constants/": ("data/constants/model_constants_config.json", re.compile(r"tensor_\d{1,9}")),
}
_ITEM_BYTES = {
    "BYTE": 1, "CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 8, "HALF": 2, "FLOAT": 4, "DOUBLE": 8, "BOOL": 1,
    "BFLOAT16": 2, "COMPLEXHALF": 4, "COMPLEXFLOAT": 8, "COMPLEXDOUBLE": 16,
}  # fmt: skip
_LARGEST = 2**63
_MOST_ELEMENTS = 2**36  # of a tensor in the graph, besides a dynamic batch
_TRUST = "if you trust the file, --unsafe-pickle"


def audit_program(archive: Archive) -> None:
    """Checks that loading the exported program in `archive` runs nothing, and that it is whole.

    Raises:
        LoadError: it would unpickle objects, load native code, call anything but ATen, or evaluate text; or
            it is damaged, or of a version that torch does not read.
    """
    path = archive.path
    for name in archive.sizes:
        if not _ENTRY.fullmatch(name):
            raise LoadError(f"{path} holds {name[:80]}, which may bring code: {_TRUST}")
    program = _parse(archive, _PROGRAM)
    _check_versions(archive, program)
    try:
        _check(schema.ExportedProgram, program, "ExportedProgram")
        _require(is_bounded(program["graph_module"]["graph"]), "a product of sizes that grows beyond bounds")
        configs = {folder: _parse(archive, config) for folder, (config, _) in _PAYLOADS.items()}
        for folder, config in configs.items():
            _check(schema.PayloadConfig, config, "PayloadConfig")
            _check_payload(archive, folder, config["config"])
        _check_signature(program["graph_module"]["signature"], configs)
    except _UnfitError as error:
        raise LoadError(f"{path} {error}") from error
    except RecursionError as error:
        raise LoadError(f"{path} is damaged: values nested too deep") from error
    if archive.sizes.get(_INPUTS):
        audit_pickle(archive.inner(_INPUTS), lambda name: None)


class _UnfitError(Exception):
    """What is wrong with a program; the message continues the name of its file."""


def _parse(archive: Archive, name: str) -> Any:
    try:
        return json.loads(archive.read(name).decode())
    except (ValueError, RecursionError) as error:
        raise LoadError(
            f"{archive.path} is damaged: {name} is not the JSON that torch.export writes"
        ) from error


def _check_versions(archive: Archive, program: Any) -> None:
    version = program.get("schema_version") if isinstance(program, dict) else None
    major = version.get("major") if isinstance(version, dict) else None
    if archive.read("archive_format") != b"pt2" or type(major) is not int:
        raise LoadError(f"{archive.path} is damaged: it is not what torch.export.save writes")
    if major != schema.SCHEMA_VERSION[0] or archive.read("archive_version") != b"0":
        raise LoadError(
            f"{archive.path} has schema version {str(major)[:20]}, and this torch reads "
            f"{schema.SCHEMA_VERSION[0]}: export it with the torch that is installed here"
        )


# The graph, by torch's schema ------------------------------------------------------------------------


def _check(kind: Any, value: Any, place: str) -> None:
    """Raises _UnfitError unless `value`, the field `place` of the schema, is of `kind` and harmless."""
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is not None:
            _check(next(a for a in arguments if a is not type(None)), value, place)
    elif origin is list:
        _check_list(arguments[0], value, place)
    elif origin is dict:
        _check_dict(arguments[1], value, place)
    elif dataclasses.is_dataclass(kind):
        _check_record(kind, value)
    else:
        _check_leaf(kind, value, place)


def _check_record(kind: Any, value: Any) -> None:
    """Checks a dataclass of the schema; a union has exactly one of its fields."""
    name = kind.__name__
    _require(isinstance(value, dict), f"a {name} that is none")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = value.keys() - fields.keys()
    _require(not unknown, f"{sorted(unknown)[:1]}, which is unknown in a {name}")
    one_of = issubclass(kind, union._Union)
    needed = {
        n for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }  # fmt: skip
    _require(len(value) == 1 if one_of else needed <= value.keys(), f"a {name} without what belongs to it")
    hints = typing.get_type_hints(kind)
    for key, item in value.items():
        _check(hints[key], item, f"{name}.{key}")
    if kind is schema.TensorMeta:
        sizes = [size["as_int"] for size in value["sizes"] if "as_int" in size]
        _require(math.prod(map(abs, sizes)) < _MOST_ELEMENTS, "a tensor of impossible size")


def _check_list(kind: Any, value: Any, place: str) -> None:
    _require(isinstance(value, list), f"a {place} that is no list")
    for item in value:
        _check(kind, item, place)
    if kind is int:
        _require(math.prod(max(1, n) for n in value) < _MOST_ELEMENTS, f"impossible sizes in {place}")


def _check_dict(kind: Any, value: Any, place: str) -> None:
    _require(isinstance(value, dict), f"a {place} that is no dictionary")
    for key, item in value.items():
        _require(place in KEYS and KEYS[place](key), f"the name {key[:80]!r} in {place}")
        _check(kind, item, place)


def _check_leaf(kind: Any, value: Any, place: str) -> None:
    if kind is str:
        _require(isinstance(value, str), f"a {place} that is no text")
        if place in ("Node.target", "Argument.as_operator") and not TEXTS[place](value):
            raise _UnfitError(
                f"calls {value[:80]}, which is no ATen operator: export the model without custom operators, "
                f"or {_TRUST}"
            )
        if place == "SymExpr.expr_str" and not TEXTS[place](value):
            raise _UnfitError(f"holds the expression {value[:80]!r}, which is not arithmetic on sizes")
        _require(place in TEXTS and TEXTS[place](value), f"{value[:80]!r} as {place}")
    elif kind is float:
        fine = type(value) in (int, float) or value in ("Infinity", "-Infinity", "NaN")
        _require(fine, f"a {place} that is no number")
    elif isinstance(kind, type) and issubclass(kind, enum.IntEnum):
        _require(type(value) is int and value in kind.__members__.values(), f"an unknown {place}")
    elif kind in (int, bool):
        fine = type(value) is kind and -_LARGEST <= value < _LARGEST
        _require(
            fine, f"a {place} that is no number" if kind is int else f"a {place} that is not true or false"
        )
    else:
        raise _UnfitError(f"holds {place}, of which nothing is known here")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise _UnfitError(f"holds {what}: it is not what torch.export writes")


# Weights -------------------------------------------------------------------------------------------


def _check_payload(archive: Archive, folder: str, config: dict[str, Any]) -> None:
    """Raises _UnfitError unless each tensor lies within its entry of the archive."""
    dtypes: dict[str, int] = {}
    for name, payload in config.items():
        if payload["use_pickle"]:
            raise _UnfitError(f"holds a pickled object, {name}: {_TRUST}")
        entry, meta = payload["path_name"], payload["tensor_meta"]
        if not _PAYLOADS[folder][1].fullmatch(entry) or meta is None:
            raise _UnfitError(f"holds the object {entry[:80]}, which is no tensor: {_TRUST}")
        size = archive.sizes.get(folder + entry)
        dtype = schema.ScalarType(meta["dtype"])
        if size is None:
            raise _UnfitError(f"is damaged: the values of {name} are missing")
        _require(
            dtype.name in _ITEM_BYTES and meta["layout"] == schema.Layout.Strided, f"{name} as {dtype.name}"
        )
        _require(dtypes.setdefault(entry, dtype) == dtype, f"{name} with the values of another dtype")
        places = [meta["sizes"], meta["strides"], [meta["storage_offset"]]]
        sizes, strides, (offset,) = ([n.get("as_int") for n in numbers] for numbers in places)
        elements, rest = divmod(size, _ITEM_BYTES[dtype.name])
        _require(not rest and fits(sizes, strides, offset, elements), f"{name} of impossible size")


def _check_signature(signature: Any, configs: dict[str, Any]) -> None:
    """Raises _UnfitError unless every parameter, buffer and constant has values."""
    stored = {name for config in configs.values() for name in config["config"]}
    for spec in signature["input_specs"]:
        for kind in ("parameter", "buffer", "tensor_constant"):
            if kind in spec:
                name = spec[kind][f"{kind}_name"]
                if name not in stored:
                    raise _UnfitError(f"is damaged: there are no values of {name}")
