"""Reads from source which BatchNorms a module calls as ``F.batch_norm(x, self.bn.running_mean, ...)``.

Nothing is run. What is not understood completely counts as another use of the BatchNorm.
"""

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pn_compiler.inspection.captured import functions_of, is_library
from pn_compiler.inspection.functional_norms import (
    NAMES,
    held_functions,
    names_in,
    reaches_batch_norm,
    scope_of,
)

_PARAMETERS = {
    F.batch_norm: tuple(inspect.signature(F.batch_norm).parameters),
    torch.batch_norm: (
        "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps",
        "cudnn_enabled",
    ),
}  # fmt: skip
_DEFAULT_EPS = inspect.signature(F.batch_norm).parameters["eps"].default
_CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PLAIN_DESCRIPTORS = (
    types.FunctionType, types.GetSetDescriptorType, types.MemberDescriptorType, property, staticmethod,
    classmethod, type,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """A call of batch_norm with the tensors of a BatchNorm.

    Attributes:
        eps: the constant in the code; None if it is that of the BatchNorm.
        affine: whether weight and bias of the BatchNorm are passed.
    """

    eps: Any
    affine: bool

    def is_like(self, norm: _BatchNorm) -> bool:
        """Whether it computes what a call of `norm` itself does, in one of its modes."""
        return self.eps in (None, norm.eps) and (self.affine or not norm.affine)


@dataclasses.dataclass(frozen=True, slots=True)
class _Uses:
    """How the code of a class calls batch_norm.

    Attributes:
        calls: attribute of self -> the calls with its tensors, if it is used for nothing else but calling it.
        complete: whether there are no other calls of batch_norm.
    """

    calls: dict[str, frozenset[_Call]]
    complete: bool


def norms_called_as_functions(owner: nn.Module) -> frozenset[str]:
    """Attributes of `owner` that are BatchNorms whose tensors its code reads only to call batch_norm.

    Each of the calls computes what the BatchNorm would, so that a replacement of it can answer them.
    """
    calls = _uses_of(owner).calls
    named = {name for function in held_functions(owner) for name in names_in(function)}
    return frozenset(
        name
        for name, child in owner.named_children()
        if isinstance(child, _BatchNorm)
        and type(child) in _CLASSES
        and name in calls.keys() - named
        and all(call.is_like(child) for call in calls[name])
    )


def calls_nothing_else(owner: nn.Module) -> bool:
    """Whether `owner` calls batch_norm as a function only on `norms_called_as_functions`."""
    uses = _uses_of(owner)
    return (
        uses.complete
        and uses.calls.keys() == norms_called_as_functions(owner)
        and not any(map(reaches_batch_norm, held_functions(owner)))
    )


def _uses_of(owner: nn.Module) -> _Uses:
    if "forward" in vars(owner):
        return _Uses({}, complete=False)
    return _uses_in(type(owner))  # type: ignore[arg-type]  # classes are hashable


@functools.cache
def _uses_in(cls: type[nn.Module]) -> _Uses:
    methods = [inspect.unwrap(method) for method in functions_of(cls) if method.__name__ != "__init__"]
    trees = [_tree_of(method) for method in methods]
    if None in trees or any(map(_holds_other_code, cls.__mro__)):
        return _Uses({}, complete=False)
    found = [_Method(tree, scope_of(method)) for tree, method in zip(trees, methods, strict=True) if tree]
    otherwise = {name for method in found for name in method.otherwise}
    names = {name for method in found for name, _ in method.calls} - otherwise
    calls = {
        name: frozenset(call for method in found for called, call in method.calls if called == name)
        for name in names
    }
    return _Uses(calls, not any(method.has_other_calls for method in found))


def _tree_of(method: types.FunctionType) -> ast.FunctionDef | None:
    """The syntax tree of `method`; None if its source is unknown, or is that of a lambda."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _holds_other_code(cls: type) -> bool:
    """Whether `cls`, written by a user, has code that `functions_of` does not give."""
    if is_library(cls):
        return False
    return any(
        hasattr(value, "__get__") and not isinstance(value, _PLAIN_DESCRIPTORS)
        for value in vars(cls).values()
    )


class _Method:
    """What one method does with the attributes of self, and with batch_norm.

    Attributes:
        calls: attributes of self whose tensors it passes to batch_norm, and how.
        otherwise: attributes, of anything, that it names for another purpose than that or calling them.
        has_other_calls: whether it may call batch_norm on other tensors.
    """

    def __init__(self, tree: ast.FunctionDef, scope: dict[str, Any]) -> None:
        nodes = list(ast.walk(tree))
        arguments = [node.arg for node in nodes if isinstance(node, ast.arg)]
        own = tree.args.args[0].arg if tree.args.args else ""
        stored = {
            node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        }
        self._self = own if arguments.count(own) == 1 and own not in stored else ""
        self._scope = {
            name: value for name, value in scope.items() if name not in stored and name not in arguments
        }
        self.calls: list[tuple[str, _Call]] = []
        known: set[ast.AST] = set()
        for node in nodes:
            if isinstance(node, ast.Call):
                known |= self._read_call(node)
        rest = [node for node in nodes if node not in known]
        self.otherwise = {name for node in rest if (name := _named(node))}
        self.has_other_calls = any(map(self._may_call, rest))

    def _read_call(self, call: ast.Call) -> set[ast.AST]:
        """The nodes of `call` that need no further look: ``self.name``, or batch_norm and its operands."""
        if self._attribute(call.func):
            return {call.func}
        function = self._resolve(call.func)
        names = next((names for known, names in _PARAMETERS.items() if known is function), ())
        given = dict(zip(names, call.args, strict=False)) | {str(k.arg): k.value for k in call.keywords}
        if not names or len(given) != len(call.args) + len(call.keywords) or not given.keys() <= {*names}:
            return set()
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            return set()
        name = self._tensor_of(given.get("running_mean"), "running_mean")
        if name is None or not self._is_plain(name, given):
            return set()
        own = [given.pop(key, None) for key in ("weight", "bias", "running_mean", "running_var")]
        numbers = ((key, given.get(key)) for key in ("training", "momentum", "eps"))
        own += [node for key, node in numbers if self._tensor_of(node, key) == name]
        eps = given.get("eps")
        number = _DEFAULT_EPS if eps is None else eps.value if isinstance(eps, ast.Constant) else None
        self.calls.append((name, _Call(number, _is_given(own[0]))))
        return {part for node in (call.func, *own) if node is not None for part in ast.walk(node)}

    def _is_plain(self, name: str, given: dict[str, ast.expr]) -> bool:
        """Whether a call with the operands `given` does what the BatchNorm self.`name` does in some mode."""
        weight, bias, training, eps = (given.get(key) for key in ("weight", "bias", "training", "eps"))
        affine = self._tensor_of(weight, "weight") == self._tensor_of(bias, "bias") == name
        own_mode = self._attribute(training) == "training" or self._tensor_of(training, "training") == name
        fixed_mode = training is None or (isinstance(training, ast.Constant) and training.value is False)
        return (
            self._tensor_of(given.get("running_var"), "running_var") == name
            and (affine or not (_is_given(weight) or _is_given(bias)))
            and (own_mode or fixed_mode)
            and (eps is None or isinstance(eps, ast.Constant) or self._tensor_of(eps, "eps") == name)
        )

    def _attribute(self, node: ast.AST | None) -> str | None:
        """ "a" for ``self.a``, else None."""
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            return None
        return node.attr if node.value.id == self._self else None

    def _tensor_of(self, node: ast.AST | None, key: str) -> str | None:
        """ "a" for ``self.a.key``, else None."""
        return self._attribute(node.value) if isinstance(node, ast.Attribute) and node.attr == key else None

    def _resolve(self, node: ast.AST) -> Any:
        """The global, or content of a global Python module, that `node` names; None if it is no such name."""
        if isinstance(node, ast.Name):
            return self._scope.get(node.id)
        if isinstance(node, ast.Attribute):
            space = self._resolve(node.value)
            return getattr(space, node.attr, None) if isinstance(space, types.ModuleType) else None
        return None

    def _may_call(self, node: ast.AST) -> bool:
        if _named(node) in NAMES or (isinstance(node, ast.Name | ast.alias) and _id(node) in NAMES):
            return True
        value = self._resolve(node)
        return callable(value) and not isinstance(value, nn.Module) and reaches_batch_norm(value)


def _is_given(node: ast.AST | None) -> bool:
    return node is not None and not (isinstance(node, ast.Constant) and node.value is None)


def _named(node: ast.AST) -> str | None:
    """The attribute that `node` names, possibly for getattr."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _id(node: ast.Name | ast.alias) -> str:
    return node.id if isinstance(node, ast.Name) else node.name
