"""Checks that text is small arithmetic on sizes, because torch passes it to sympy, which evaluates it."""

import ast
import math
import re
from collections.abc import Callable

_SYMBOL = re.compile(r"[a-z]{1,3}\d{1,5}")
_LONGEST = 4000  # characters
_MOST_BITS = 2000  # of a number during evaluation
_SYMBOL_BITS = 32
_FLOAT_BITS = 64
_FLOAT = re.compile(r"-?\d{1,40}(\.\d{0,40})?(e[+-]?\d{1,3})?")
_PRODUCTS = frozenset(["Mul"])
_POWERS = frozenset(["Pow", "PowByNatural"])
_OTHERS = frozenset(
    [
        "Add", "Max", "Min", "Where", "Integer", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv",
        "ModularIndexing", "IntTrueDiv", "FloatTrueDiv", "TruncToInt", "FloorToInt", "CeilToInt", "ToFloat",
        "RoundToInt", "Abs", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "floor",
        "ceiling", "sqrt", "Rational",
        "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
    ]
)  # fmt: skip
_CONSTANTS = frozenset(["oo", "int_oo"])
_ASSUMPTIONS = frozenset(["positive", "nonnegative", "integer", "real", "commutative", "finite"])


def is_size_expression(text: str) -> bool:
    """Whether `text` is arithmetic on size symbols and numbers whose result stays small."""
    if len(text) > _LONGEST or not text.isascii():  # Python normalizes other letters to these
        return False
    try:
        return _bits(ast.parse(text, mode="eval").body) <= _MOST_BITS
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _bits(node: ast.expr) -> int:
    """An upper bound on the bits of the number that `node` evaluates to.

    Raises:
        ValueError: it is not arithmetic, or its numbers grow beyond what sizes need.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        bits = node.value.bit_length() if isinstance(node.value, int) else _FLOAT_BITS
    elif isinstance(node, ast.Name) and (node.id in _CONSTANTS or _SYMBOL.fullmatch(node.id)):
        bits = _SYMBOL_BITS
    elif isinstance(node, ast.UnaryOp):
        bits = _bits(node.operand)
    elif isinstance(node, ast.BinOp):
        bits = _binary(node.op)([_bits(node.left), _bits(node.right)], node.right)
    elif isinstance(node, ast.Compare):
        bits = max(map(_bits, (node.left, *node.comparators)))
    elif isinstance(node, ast.BoolOp):
        bits = max(map(_bits, node.values))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        bits = _call(node, node.func.id)
    else:
        raise ValueError("not arithmetic")
    if bits > _MOST_BITS:
        raise ValueError("too large a number")
    return bits


def _call(node: ast.Call, name: str) -> int:
    if name == "Symbol":
        return _symbol(node)
    if name == "Float":
        return _float(node)
    if not all(k.arg == "evaluate" and isinstance(k.value, ast.Constant) for k in node.keywords):
        raise ValueError("not a function of sizes")
    bits = [_bits(argument) for argument in node.args]
    if name in _POWERS and len(bits) == 2:
        return _power(bits, node.args[1])
    if name in _PRODUCTS:
        return sum(bits)
    if name in _OTHERS:
        return max(bits, default=0) + len(bits)
    raise ValueError("not a function of sizes")


def _symbol(node: ast.Call) -> int:
    """``Symbol('s0', positive=True, integer=True)``"""
    texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    flags = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    if len(node.args) != 1 or len(texts) != 1 or not _SYMBOL.fullmatch(texts[0]):
        raise ValueError("not a symbol")
    if len(flags) != len(node.keywords) or not flags.keys() <= _ASSUMPTIONS:
        raise ValueError("not a symbol")
    if not all(type(flag) is bool for flag in flags.values()):
        raise ValueError("not a symbol")
    return _SYMBOL_BITS


def _float(node: ast.Call) -> int:
    """``Float('2.0', precision=53)`` or ``Float(2.0)``"""
    values = [a.value for a in node.args if isinstance(a, ast.Constant)]
    options = [(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)]
    if len(values) != 1 or len(node.args) != 1 or len(options) != len(node.keywords):
        raise ValueError("not a number")
    if not _FLOAT.fullmatch(str(values[0])) or options not in ([], [("precision", 53)]):
        raise ValueError("not a number")
    return _FLOAT_BITS


def _binary(operator: ast.operator) -> Callable[[list[int], ast.expr], int]:
    if isinstance(operator, ast.Add | ast.Sub | ast.Div | ast.FloorDiv | ast.Mod):
        return lambda bits, right: max(bits) + 1
    if isinstance(operator, ast.Mult):
        return lambda bits, right: sum(bits)
    if isinstance(operator, ast.Pow):
        return _power
    raise ValueError("not arithmetic on sizes")


def _power(bits: list[int], exponent: ast.expr) -> int:
    """Bits of a power, whose exponent must be a literal number."""
    return bits[0] * max(1, math.ceil(min(abs(_number(exponent)), _MOST_BITS + 1)))


def _number(node: ast.expr) -> float:
    if isinstance(node, ast.UnaryOp):
        return _number(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Integer":
        return _number(node.args[0]) if len(node.args) == 1 else math.inf
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Rational":
        return max(map(_number, node.args), default=math.inf)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    raise ValueError("an exponent that is computed")
