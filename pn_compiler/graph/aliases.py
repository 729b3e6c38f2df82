"""Alias analysis: which values of a graph share memory, and which of those are overwritten.

A graph shows data flow, but a write has no edge to other readers of the same memory: an earlier view, the
input of a module that returned it, another piece of a split. Operator schemas of torch (``Tensor(a!)``) are
trusted; for code that is not torch's own the worst is assumed: that it overwrites its inputs and returns a
view of them.
"""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn

from pn_compiler.graph.graph_utils import called_module
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.nn import AnchoredNorm, ConstantClamp, ProxyNormAct
from pn_compiler.operators.op_names import operator_name, reads_shape
from pn_compiler.operators.traits import traits_named

_IN_PLACE_OPERATORS = frozenset(
    f"i{name}"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
) | {"ilshift", "irshift"}

#: Results that may be views, or the input itself, although no schema says so: dropout in eval mode.
_UNDECLARED_VIEWS = frozenset(
    [
        "align_as", "align_tensors", "align_to", "alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d",
        "broadcast_tensors", "cartesian_prod", "channel_shuffle", "data", "dequantize", "dropout", "einsum",
        "feature_alpha_dropout", "feature_dropout", "meshgrid", "native_channel_shuffle", "pixel_shuffle",
        "pixel_unshuffle", "refine_names", "rename", "sum_to_size", "to_dense", "type_as", "unsafe_chunk",
        "unsafe_split", "unsafe_split_with_sizes", "_unsafe_view", "_reshape_alias",
    ]
)  # fmt: skip

#: Functions without a schema under their name whose result is new memory.
_NEW_MEMORY = frozenset(
    [
        "and_", "eq", "floordiv", "fold", "ge", "gt", "gumbel_softmax", "interpolate", "invert", "le",
        "local_response_norm", "lp_pool1d", "lp_pool2d", "lp_pool3d", "lt", "mod", "ne", "normalize",
        "not_", "one_hot", "or_", "rfloordiv", "softmin", "softsign", "tanhshrink", "truediv", "upsample",
        "xor",
    ]
)  # fmt: skip

_ATTRIBUTES_WITHOUT_MEMORY = frozenset(
    ["device", "dtype", "is_cuda", "itemsize", "layout", "names", "nbytes", "ndim", "requires_grad", "shape"]
)
_SHARING_MODULES = (
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    ConstantClamp,
)
_OWN_LAYERS = (ProxyNormAct.__module__, AnchoredNorm.__module__, ConstantClamp.__module__)


@dataclasses.dataclass(frozen=True, slots=True)
class Aliases:
    """Values whose memory is overwritten after they were computed.

    Attributes:
        overwritten: all such values.
        pinned: those that are read afterwards under another name, that the caller can see, or that are
            written through ``.data``. The graph has no edge for that effect, so it is only preserved if
            nothing around them changes.
        returned: values whose memory the caller is given, and may overwrite before the backward.
    """

    overwritten: frozenset[fx.Node]
    pinned: frozenset[fx.Node]
    returned: frozenset[fx.Node]

    @property
    def not_kept(self) -> frozenset[fx.Node]:
        """Values that may be gone when the backward runs: a gradient must not need them."""
        return self.overwritten | self.returned


def find_aliases(gm: fx.GraphModule) -> Aliases:
    """Follows the memory of every value of `gm` through the graph, in execution order."""
    group_of: dict[fx.Node, set[fx.Node]] = {}
    overwritten: set[fx.Node] = set()
    pinned: set[fx.Node] = set()
    returned: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "output":
            returned.update(*(group_of[value] for value in node.all_input_nodes))
        targets = writes(gm, node)
        for target in targets:
            group = group_of[target]
            overwritten |= group
            others = set(node.all_input_nodes) - set(targets)
            if others & group or any(_is_data(m) or _is_seen_after(m, node) for m in group):
                pinned |= group
        group = {node}
        for source in shares(gm, node):
            group |= group_of[source]
        for member in group:
            group_of[member] = group
    return Aliases(frozenset(overwritten), frozenset(pinned), frozenset(returned))


def _is_data(value: fx.Node) -> bool:
    """Whether it is ``x.data``: autograd does not notice a write, and the backward reads what is written."""
    return value.target is getattr and value.args[1] == "data"


def _is_seen_after(value: fx.Node, write: fx.Node) -> bool:
    """Whether anything besides the result of `write` observes its effect on the memory of `value`."""
    if value.op in ("placeholder", "get_attr"):
        return True  # the caller, and the next call
    return any(user > write and not reads_shape(user) for user in value.users)


def writes(gm: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The inputs of `node` that it overwrites, or may overwrite."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if not _is_known(module):
            return node.all_input_nodes
        return node.all_input_nodes[:1] if _is_in_place(module) else []
    if node.op not in ("call_function", "call_method"):
        return []
    if _is_foreign(node):
        return node.all_input_nodes
    flagged = [value for value, (write, _) in _declared(node) if write]
    flagged += _nodes(node.kwargs.get("out"))
    first = node.all_input_nodes[:1]
    if _is_named_in_place(node) or inplace_of(node) not in (None, False):
        flagged += first
    return list(dict.fromkeys(flagged))


def shares(gm: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The inputs of `node` with which its result shares memory, or may share it."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if not _is_known(module) or (any(True for _ in module.children()) and not _is_own(module)):
            return node.all_input_nodes
        sharing = isinstance(module, _SHARING_MODULES) or _is_in_place(module)
        return node.all_input_nodes[:1] if sharing else []
    if node.op not in ("call_function", "call_method") or reads_shape(node):
        return []
    if node.target is getattr and node.args[1] in _ATTRIBUTES_WITHOUT_MEMORY:
        return []
    if node.target is operator.getitem and isinstance(
        called_module(gm, node.all_input_nodes[0]), ProxyNormAct
    ):
        return []  # each of its results has its own memory
    name, known = operator_name(node), _is_torch(node)
    if not known or _is_foreign(node) or name in _UNDECLARED_VIEWS:
        return node.all_input_nodes
    return list(dict.fromkeys([value for value, (_, share) in _declared(node) if share] + writes(gm, node)))


def has_effect(gm: nn.Module, node: fx.Node, pinned: Collection[fx.Node]) -> bool:
    """Whether `node` may overwrite what others observe: a `pinned` value, or anything in foreign code."""
    targets = writes(gm, node)
    if node.op == "call_module" or _is_foreign(node):
        return bool(targets)
    return any(target in pinned for target in targets)


def tensor_behind(gm: nn.Module, node: fx.Node) -> str | None:
    """The path of the parameter or buffer that `node` is, or may be a view of; else None."""
    if node.op == "get_attr":
        return str(node.target)
    paths = (tensor_behind(gm, source) for source in shares(gm, node))
    return next((path for path in paths if path is not None), None)


def returns_target(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The tensor that `node` overwrites and returns, or None.

    Also None for what may be a number: ``n += 1`` makes a new one and leaves n unchanged.
    """
    targets = writes(gm, node)
    given = (*node.args[:1], node.kwargs.get("input"), node.kwargs.get("out"))
    if len(targets) != 1 or targets[0] not in given:
        return None
    if in_place_operator(node) and not makes_tensor(gm, targets[0]):
        return None
    module = called_module(gm, node)
    if module is not None:
        return targets[0] if _is_known(module) and not list(module.children()) else None
    nothing = operator_name(node) in ("setitem", "delitem", "__setitem__", "__delitem__")
    return None if nothing or _is_foreign(node) else targets[0]


def makes_tensor(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is certainly a tensor, not a number, tuple or list."""
    module = called_module(gm, node)
    if module is not None:
        return _is_known(module) and isinstance(module, _ONE_TENSOR)
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method") or reads_shape(node):
        return False
    name = operator_name(node)
    if node.target is operator.getitem:
        source = node.all_input_nodes[0]
        pieces = traits_named(operator_name(source)).pieces
        return makes_tensor(gm, source) or (pieces and isinstance(node.args[1], int))
    if getattr(operator, name, None) is node.target:  # of numbers as well as of tensors
        return any(makes_tensor(gm, source) for source in node.all_input_nodes)
    return _returns_tensor(name)


def in_place_operator(node: fx.Node) -> str | None:
    """The operator, such as "add", that a node such as ``y += 1`` applies in place; else None."""
    name = operator_name(node).removeprefix("__").removesuffix("__")
    return name[1:] if name in _IN_PLACE_OPERATORS else None


def inplace_of(node: fx.Node) -> Any:
    """The ``inplace`` argument of a call to a torch.nn.functional function; None if it has none."""
    arguments = _bound(node)
    return None if arguments is None else arguments.get("inplace")


def name_options(node: fx.Node) -> None:
    """Rewrites ``F.relu(x, True)`` to the equivalent ``F.relu(x, inplace=True)``."""
    arguments = _bound(node)
    if arguments is not None and arguments.get("inplace") is not None and len(node.args) > 1:
        first = next(iter(arguments))
        node.args = (arguments.pop(first),)
        node.kwargs = arguments


_ONE_TENSOR = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Linear,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    *_SHARING_MODULES,
    *(getattr(nn, name) for name in nn.modules.activation.__all__ if name != "MultiheadAttention"),
)


def _bound(node: fx.Node) -> dict[str, Any] | None:
    """Arguments by name for a function with an ``inplace`` option, else None."""
    if node.op != "call_function":
        return None
    signature = _signature_with_inplace(node.target)
    if signature is None:
        return None
    try:
        return dict(signature.bind(*node.args, **node.kwargs).arguments)
    except TypeError:
        return None


@functools.cache
def _signature_with_inplace(function: Any) -> inspect.Signature | None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built in
        return None
    return signature if "inplace" in signature.parameters else None


def _is_own(module: nn.Module) -> bool:
    return type(module).__module__ in _OWN_LAYERS


def _is_known(module: nn.Module) -> bool:
    """Whether calling `module` runs only code of torch and this package."""
    return all(
        (type(m).__module__.startswith("torch.nn.") or _is_own(m))
        and not has_hooks(m)
        and "forward" not in vars(m)
        for m in module.modules()
    )


def _is_in_place(module: nn.Module) -> bool:
    return not _is_own(module) and any(getattr(m, "inplace", False) for m in module.modules())


def _is_torch(node: fx.Node) -> bool:
    """Whether it is known what `node` shares: it has a schema or is in one of the lists."""
    name = operator_name(node)
    return isinstance(node.target, torch._ops.OpOverload) or name in _NEW_MEMORY or bool(_schemas(name))


def _is_foreign(node: fx.Node) -> bool:
    """Whether `node` calls a function from outside torch and Python, about which nothing is known."""
    if node.op != "call_function" or operator_name(node) or isinstance(node.target, torch._ops.OpOverload):
        return False
    origin = getattr(node.target, "__module__", None) or ""
    return origin.partition(".")[0] not in ("torch", "builtins", "math", "_operator", "pn_compiler")


def _is_named_in_place(node: fx.Node) -> bool:
    """Whether the name of `node` says that it overwrites its first input: add_, iadd, __iadd__, setitem."""
    name = operator_name(node)
    if in_place_operator(node) or name.strip("_") in ("setitem", "delitem"):
        return True
    of_python = getattr(operator, name, None) is node.target  # operator.and_ overwrites nothing
    return name.endswith("_") and not name.startswith("__") and not of_python


def _declared(node: fx.Node) -> Iterator[tuple[fx.Node, tuple[bool, bool]]]:
    """Each input of `node` with (is overwritten, is shared by the result), according to the schemas."""
    overload = isinstance(node.target, torch._ops.OpOverload)
    schemas = (_flags(node.target._schema),) if overload else _schemas(operator_name(node))  # type: ignore[union-attr]
    for flags in schemas:
        names = list(flags)
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        for name, value in given.items():
            for source in _nodes(value):
                yield source, flags.get(name, (False, False))


_Flags = dict[str, tuple[bool, bool]]


def _flags(schema: Any) -> _Flags:
    return {
        argument.name: (
            argument.alias_info is not None and argument.alias_info.is_write,
            argument.alias_info is not None and argument.name != "out",
        )
        for argument in schema.arguments
    }


@functools.cache
def _schemas(name: str) -> tuple[_Flags, ...]:
    """What each overload of the ATen operator `name` does to its arguments, by name; () without overloads."""
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}") if name else []
    firsts = [str(schema.arguments[0].type) if schema.arguments else "" for schema in schemas]
    if "Tensor" in firsts:  # TorchScript's own sort of a list works in place, that of a tensor does not
        schemas = [
            s for s, first in zip(schemas, firsts, strict=True) if not first.startswith(("List", "Dict"))
        ]
    return tuple(_flags(schema) for schema in schemas)


@functools.cache
def _returns_tensor(name: str) -> bool:
    """Whether every overload of the ATen operator `name` on tensors returns one tensor."""
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}") if name else []
    of_tensors = [
        s for s in schemas if s.arguments and str(s.arguments[0].type) in ("Tensor", "List[Tensor]")
    ]
    returned = [[str(value.type) for value in schema.returns] for schema in of_tensors]
    return bool(returned) and all(types in (["Tensor"], []) for types in returned)


def _nodes(value: Any) -> list[fx.Node]:
    """The nodes in an argument, which may be nested."""
    nodes: list[fx.Node] = []
    fx.map_arg(value, nodes.append)
    return nodes
