"""The type that a value of a graph has in a real call, as far as operators and example inputs tell."""

import dis
import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

from pn_compiler.operators import in_place
from pn_compiler.operators.op_names import operator_name
from pn_compiler.proxies.autograd_functions import FunctionCall

UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "unknown"})()
SAMPLE = torch.empty(1, 1)  # stands for every tensor
_PARAMETER = nn.Parameter(torch.empty(1, 1), requires_grad=False)
_MAYBE_NONE = frozenset(["grad", "grad_fn", "_base", "_grad", "_grad_fn", "_backward_hooks", "names"])

_SEVERAL_OUTPUTS = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.AdaptiveLogSoftmaxWithLoss,
    nn.Identity,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    nn.modules.container.ModuleList,
    nn.modules.container.ModuleDict,
)

_LOADS = ("LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK")
_NO_EFFECT = frozenset(["COPY_FREE_VARS", "EXTENDED_ARG", "KW_NAMES", "MAKE_CELL", "NOP", "RESUME"])
_RETURNS = frozenset(["RETURN_VALUE", "BUILD_TUPLE", "BUILD_LIST", "BUILD_MAP", "BUILD_CONST_KEY_MAP"])


def sample_inputs(value: Any) -> Any:
    """`value` with a sample in the place of each tensor."""
    return pytree.tree_map_only(torch.Tensor, lambda _: SAMPLE, value)


def may_be_none(value: Any, attribute: str) -> bool:
    """Whether some values of the type of `value` have None as `attribute`."""
    return isinstance(value, torch.Tensor) and attribute in _MAYBE_NONE


def is_python_value(value: Any) -> bool:
    """Whether `value`, a sample, is a number, a shape, or what else no mode of torch has a part in."""
    return isinstance(value, int | float | torch.Size | torch.dtype | torch.device)


def has_attribute(value: Any, name: str) -> bool:
    """Whether values of the type of `value`, a sample, have that attribute."""
    return hasattr(torch.Tensor, name) if isinstance(value, torch.Tensor) else hasattr(value, name)


@functools.cache
def may_return_none(cls: type) -> bool:
    """Whether the forward of a user's module has None in what it returns: a branch on that would be lost."""
    code = getattr(getattr(cls, "forward", None), "__code__", None)  # TorchScript has none
    if code is None or cls.__module__.startswith(("torch.", "pn_compiler.")):
        return False
    stack: list[bool] = []  # whether None is among what the expression so far consists of
    variables: set[Any] = set()  # those that None was assigned to
    steps = list(dis.get_instructions(code))
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        index = after is not None and after.opname in ("BINARY_SUBSCR", "STORE_SUBSCR")  # x[:, None]
        if step.opname == "RETURN_CONST" and _holds_none(step.argval):
            return True
        if step.opname in _RETURNS and any(stack) and not index:
            return True
        if step.opname == "STORE_FAST" and any(stack):
            variables.add(step.argval)
        is_none = step.opname == "LOAD_CONST" and _holds_none(step.argval)
        _advance(stack, step, is_none or (step.opname in _LOADS and step.argval in variables))
    return False


def _advance(stack: list[bool], step: dis.Instruction, is_none: bool) -> None:
    """What `step`, in the order of the code, makes of `stack`; jumps are not followed."""
    if step.opname.startswith(("STORE_FAST", "RETURN_")) or step.opname == "POP_TOP":
        stack.clear()
        return
    if "JUMP" in step.opname or step.opname in _NO_EFFECT:
        return
    effect = dis.stack_effect(step.opcode, step.arg, jump=False)
    if effect <= 0:  # it replaces one operand or more by a result
        del stack[max(0, len(stack) + effect - 1) :]
        effect = 1
    stack += [False] * (effect - 1) + [is_none]


def _holds_none(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and any(map(_holds_none, value)))


def attribute_of(value: Any, name: str) -> Any:
    """The attribute of a value of known type, or UNKNOWN."""
    if value is UNKNOWN:
        return UNKNOWN
    try:
        found = getattr(value, name)
    except Exception:  # properties may raise anything
        return UNKNOWN
    return SAMPLE if isinstance(found, torch.Tensor) else found


def sample_of(node: fx.Node, root: nn.Module, samples: dict[fx.Node, Any]) -> Any:
    """A value of the type that `node` has, or UNKNOWN; `samples` holds those of placeholders."""
    if node not in samples:
        try:
            samples[node] = _sample(node, root, samples)
        except Exception:  # a rule that does not fit these operands
            samples[node] = UNKNOWN
    return samples[node]


def _sample(node: fx.Node, root: nn.Module, samples: dict[fx.Node, Any]) -> Any:
    def given(arg: Any) -> Any:
        return sample_of(arg, root, samples) if isinstance(arg, fx.Node) else arg

    if node.op == "get_attr":
        return _attribute(root, str(node.target))
    first = given(node.args[0]) if node.args else UNKNOWN
    if node.op == "call_module":
        return _of_module(root.get_submodule(str(node.target)), first)
    if node.op == "call_method":
        return _of_method(str(node.target), first, len(node.args)) if first is not UNKNOWN else UNKNOWN
    if node.op != "call_function":
        return UNKNOWN
    if node.target is getattr:
        return attribute_of(first, str(node.args[1]))
    if node.target is operator.getitem:
        return _item(first, node.args[1])
    if getattr(node.target, "__module__", "") in ("_operator", in_place.__name__):
        return _of_operator(node.target, [given(a) for a in node.args])
    return _of_function(node, first)


def _attribute(root: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    value = getattr(root.get_submodule(owner), name)
    if isinstance(value, nn.Parameter):
        return _PARAMETER
    return SAMPLE if type(value) is torch.Tensor else UNKNOWN


def _of_module(module: nn.Module, first: Any) -> Any:
    """What a layer of torch.nn, or of this package, returns."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    if any(hooks) or "forward" in vars(module) or isinstance(module, FunctionCall):
        return UNKNOWN
    if isinstance(module, nn.Identity) and type(module).forward is nn.Identity.forward:
        return first
    if type(module).__module__.startswith(("torch.nn.modules.", "pn_compiler.")):
        several = isinstance(module, _SEVERAL_OUTPUTS) and getattr(module, "return_indices", True)
        return UNKNOWN if several else SAMPLE
    return UNKNOWN


def _of_method(name: str, first: Any, operands: int) -> Any:
    if not isinstance(first, torch.Tensor):
        return UNKNOWN
    if name == "size":
        return SAMPLE.shape if operands == 1 else 1
    return _of_schema(name, first)


def _of_operator(target: Any, operands: list[Any]) -> Any:
    if any(value is UNKNOWN for value in operands):
        return UNKNOWN
    plain = (torch.Tensor, int, float, complex)
    if not all(isinstance(value, plain) for value in operands):
        return UNKNOWN
    if any(isinstance(value, torch.Tensor) for value in operands):
        return SAMPLE
    return target(*operands)


def _of_function(node: fx.Node, first: Any) -> Any:
    name = operator_name(node)
    if not name:
        return UNKNOWN
    if getattr(F, name, None) is node.target and hasattr(node.target, "__annotations__"):
        return SAMPLE if node.target.__annotations__.get("return") is torch.Tensor else UNKNOWN
    return _of_schema(name, first)


def _of_schema(name: str, first: Any) -> Any:
    """What the ATen operator of that name returns, if all overloads that take `first` return the same."""
    packet = getattr(torch.ops.aten, name)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    if isinstance(first, torch.Tensor):
        schemas = [s for s in schemas if s.arguments and str(s.arguments[0].type) == "Tensor"]
    kinds = {tuple(str(r.type) for r in s.returns) for s in schemas if "out" not in s.overload_name}
    if len(kinds) != 1:
        return UNKNOWN
    kind = kinds.pop()
    if len(kind) != 1:
        return UNKNOWN
    return {"Tensor": SAMPLE, "List[Tensor]": (SAMPLE,), "int": 1, "bool": True}.get(kind[0], UNKNOWN)


def _item(value: Any, index: Any) -> Any:
    if value is UNKNOWN or isinstance(value, torch.Tensor):
        return SAMPLE if isinstance(value, torch.Tensor) else UNKNOWN
    if isinstance(value, Mapping):
        return value.get(index, UNKNOWN)
    try:
        return value[index]
    except IndexError:  # as many as the shape has dimensions, or the split pieces
        return value[0] if len({type(item) for item in value}) == 1 else UNKNOWN
