"""Whether an exported program can be loaded without running what its file brings.

``torch.export.load`` unpickles objects, loads compiled libraries, looks operators up by dotted name anywhere
below ``torch``, and hands size expressions to sympy, which evaluates them. Here each of these is read first.
"""

import ast
import json
import operator
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pn_compiler.errors import LoadError

_PROGRAM_ENTRY = re.compile(
    r"models/model\.json|archive_format|archive_version|byteorder|version|\.data/\w+|extra/.*"
    r"|data/sample_inputs/model\.pt|data/(weights/weight_\d+|constants/tensor_\d+)"
    r"|data/(weights/model_weights|constants/model_constants)_config\.json"
)
_TENSOR_FILE = re.compile(r"(weight|tensor)_\d+")
_OPERATOR = re.compile(r"torch\.ops\.(aten|prims|prim|higher_order)\.(?!_*__)\w+(\.(?!__)\w+)?")
_SYMBOL = re.compile(r"[a-z]{1,2}\d+")
_SYMPY_NAMES = frozenset(
    [
        "Add", "Mul", "Integer", "Float",
        "Symbol", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "Max", "Min",
        "ModularIndexing", "Where", "IntTrueDiv", "FloatTrueDiv", "TruncToInt", "FloorToInt", "CeilToInt",
        "ToFloat", "RoundToInt", "Pow", "PowByNatural", "Abs", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And",
        "Or", "Not", "floor", "ceiling", "sqrt", "oo", "int_oo",
    ]
)  # fmt: skip


def audit_program(path: Path, names: list[str]) -> None:
    """Checks that loading the exported program at `path`, with archive entries `names`, runs nothing.

    Raises:
        LoadError: it would unpickle objects, load native code, call other than ATen, or evaluate text.
    """
    trust = "if you trust the file, --unsafe-pickle"
    for name in names:
        inside = name.partition("/")[2]  # below the folder that every archive has
        if not _PROGRAM_ENTRY.fullmatch(inside):
            raise LoadError(f"{path} holds {inside}, which may bring code: {trust}")
    with zipfile.ZipFile(path) as archive:
        contents = [json.loads(archive.read(n)) for n in names if n.endswith(".json")]
    for key, value in (pair for content in contents for pair in _walk(content)):
        if key == "use_pickle" and value:
            raise LoadError(f"{path} holds a pickled object: {trust}")
        if key == "path_name" and not _TENSOR_FILE.fullmatch(str(value)):
            raise LoadError(f"{path} holds the object {value}, which is no tensor: {trust}")
        if key == "target" and isinstance(value, str) and not _is_harmless_operator(value):
            raise LoadError(
                f"{path} calls {value}, which is no ATen operator: export the model without custom "
                f"operators, or {trust}"
            )
        if key == "expr_str" and not _is_harmless_expression(str(value)):
            raise LoadError(f"{path} holds the expression {str(value)[:80]!r}, which is not arithmetic")


def _walk(content: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of nested JSON."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _walk(value)
    elif isinstance(content, list):
        for value in content:
            yield from _walk(value)


def _is_harmless_operator(target: str) -> bool:
    module, _, name = target.partition(".")
    if module in ("_operator", "math"):
        return name.isidentifier() and not name.startswith("_") and name not in _CALLING_OPERATORS
    return bool(_OPERATOR.fullmatch(target)) or target in _SYMBOLIC_FUNCTIONS or "." not in target


_CALLING_OPERATORS = {"attrgetter", "itemgetter", "methodcaller", "call"} & set(dir(operator))
_SYMBOLIC_FUNCTIONS = {
    f"torch.{name}" for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_sqrt")
} | {"torch._sym_sqrt"}


def _is_harmless_expression(text: str) -> bool:
    """Whether `text` is arithmetic on size symbols and numbers; sympy would evaluate it as Python."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return False
    allowed = (
        ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Call, ast.Name, ast.Load,
        ast.Constant, ast.keyword, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
    )  # fmt: skip
    for node in ast.walk(tree):
        if not isinstance(node, allowed):
            return False
        if isinstance(node, ast.Name) and not (node.id in _SYMPY_NAMES or _SYMBOL.fullmatch(node.id)):
            return False
        if isinstance(node, ast.Constant) and not (
            isinstance(node.value, int | float)
            or (isinstance(node.value, str) and _SYMBOL.fullmatch(node.value))
        ):
            return False
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            return False
    return True
