"""Reads from a module's source how it uses its children; nothing is run."""

import ast
import dis
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator

from torch import nn

from pn_compiler.inspection.captured import functions_of, nested_codes


def is_called_whole(owner: nn.Module, name: str, child: nn.Module) -> bool:
    """Whether the code of `owner` calls ``self.name(...)`` and does nothing else with it.

    A child that is iterated over, indexed or has its attributes read must keep its class. So must one with
    optional arguments, because it is unknown which of them the call passes.
    """
    parameters = inspect.signature(child.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(p.kind not in plain or p.default is not p.empty for p in parameters):
        return False
    called, otherwise = _uses(type(owner))  # type: ignore[arg-type]  # classes are hashable
    return name in called and name not in otherwise


@functools.cache
def _uses(cls: type) -> tuple[frozenset[str], frozenset[str]]:
    """Attributes of self that the methods of `cls` call, and those that they use in any other way.

    Assigning to an attribute and comparing it with None do not count.
    """
    called: set[str] = set()
    otherwise: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for tree in _methods(base):
            calls = {id(callee) for node in ast.walk(tree) if (callee := _callee(node)) is not None}
            tests = {id(node) for node in _tests(tree)}
            owners = {"self", *(argument.arg for argument in tree.args.args[:1])}
            for node in ast.walk(tree):
                if not (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id in owners
                ):
                    continue
                if id(node) in calls:
                    called.add(node.attr)
                elif id(node) not in tests:
                    otherwise.add(node.attr)
    return frozenset(called), frozenset(otherwise)


@functools.cache
def read_norms(cls: type) -> frozenset[str]:
    """Attributes of which the forward of `cls` reads BatchNorm-like parameters or statistics."""
    methods = {function.__name__: function for function in reversed([*functions_of(cls)])}
    names: set[str] = set()
    forward = inspect.getattr_static(cls, "forward", None)
    remaining = [forward] if isinstance(forward, types.FunctionType) else []
    while remaining:
        before = None
        for instruction in dis.get_instructions(remaining.pop()):
            name = instruction.argval
            if name in _NORM_STATE and before is not None and before.opname == "LOAD_ATTR":
                names.add(str(before.argval))
            if name in methods:
                remaining.append(methods.pop(name))  # each once
            before = instruction
    return frozenset(names)


_NORM_STATE = frozenset(["weight", "bias", "running_mean", "running_var", "num_batches_tracked"])


def _callee(node: ast.AST) -> ast.expr | None:
    """The function that `node` calls, directly or through torch.utils.checkpoint."""
    if not isinstance(node, ast.Call):
        return None
    through = getattr(node.func, "attr", getattr(node.func, "id", "")) == "checkpoint"
    return node.args[0] if through and node.args else node.func


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    """Syntax trees of the methods that `cls` itself defines, except the constructor."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            yield node


def _tests(tree: ast.AST) -> Iterator[ast.expr]:
    """Expressions that are compared with None, tested, or assigned to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(
            isinstance(c, ast.Constant) and c.value is None for c in node.comparators
        ):
            yield node.left
        elif isinstance(node, ast.If | ast.IfExp):
            yield node.test
        elif isinstance(node, ast.Assign):
            yield from node.targets


_STATISTICS = frozenset(["running_mean", "running_var"])  # only a BatchNorm has them


@functools.cache
def children_looked_into(cls: type) -> frozenset[str] | None:
    """Attributes of self whose running statistics methods of `cls` read; None if not all are known."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            break
        codes = [value.__code__ for value in vars(base).values() if hasattr(value, "__code__")]
        if not any(_STATISTICS.intersection(c.co_names) for code in codes for c in nested_codes(code)):
            continue
        reads = [read for tree in _methods(base) for read in _reads_of_statistics(tree)]
        if not reads or None in reads:
            return None
        names.update(name for name in reads if name)
    return frozenset(names)


def _reads_of_statistics(tree: ast.FunctionDef) -> Iterator[str | None]:
    """For each read in a method: "a" for ``self.a.b.running_mean``, "" for self's own, None for others."""
    owners = {"self", *(argument.arg for argument in tree.args.args[:1])}
    for read in ast.walk(tree):
        if isinstance(read, ast.Attribute) and read.attr in _STATISTICS:
            node, first = read.value, ""
            while isinstance(node, ast.Attribute):
                first, node = node.attr, node.value
            yield first if isinstance(node, ast.Name) and node.id in owners else None
