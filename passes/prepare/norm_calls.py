"""Calls of batch_norm as a function: their operands, and the module that can replace them."""

import dataclasses
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pn_compiler.graph.graph_utils import add_module, called_module, module_calls
from pn_compiler.graph.ranks import rank
from pn_compiler.inspection.batch_norms import FixedMode
from pn_compiler.inspection.functional_norms import NAMES
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.nn import ReadTraining
from pn_compiler.operators.op_names import input_of, operands, operator_name

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_ATEN = (*_TENSORS, "training", "momentum", "eps")  # the operands after the input
_FUNCTIONAL = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_OTHER_NAMES = {
    "exponential_average_factor": "momentum", "epsilon": "eps", "use_input_stats": "training",
}  # fmt: skip
_FIXED_MODE = {
    "_native_batch_norm_legit_no_training": False, "_batch_norm_no_update": False,
    "_batch_norm_with_update": True, "_batch_norm_with_update_functional": True,
}  # fmt: skip
_NORMS: dict[int, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def is_norm_call(node: fx.Node) -> bool:
    """Whether `node` calls batch_norm, under any name, on a value that depends on the graph's inputs.

    timm's StdConv2d calls it on a weight. With only running statistics, instance_norm is batch_norm.
    """
    name = operator_name(node)
    if name == "instance_norm" and norm_operands(node).get("training", True) is not False:
        return False
    return (name in NAMES or name == "instance_norm") and _depends_on_inputs(input_of(node))


def norm_operands(node: fx.Node) -> dict[str, Any]:
    """The operands of a batch_norm or instance_norm by name, whatever their order."""
    name = operator_name(node)
    if name in _FIXED_MODE:
        given = operands(node, *(n for n in _ATEN if n != "training")) | {"training": _FIXED_MODE[name]}
    elif name == "_native_batch_norm_legit" and len(node.args) + len(node.kwargs) <= 6:  # its no_stats
        given = operands(node, "weight", "bias", "training", "momentum", "eps")
    else:
        given = operands(node, *(_FUNCTIONAL if _is_functional(node) else _ATEN))
    return {_OTHER_NAMES.get(key, key): value for key, value in given.items() if key != "input"}


def _is_functional(node: fx.Node) -> bool:
    """F.batch_norm takes (running_mean, running_var, weight, bias); torch's and ATen's take the reverse."""
    return node.target in (F.batch_norm, F.instance_norm)


def _depends_on_inputs(value: Any) -> bool:
    remaining, seen = [value], set()
    while remaining:
        node = remaining.pop()
        if isinstance(node, fx.Node) and node not in seen:
            if node.op == "placeholder":
                return True
            seen.add(node)
            remaining += node.all_input_nodes
    return False


@dataclasses.dataclass(frozen=True, slots=True)
class _Site:
    """Calls of batch_norm on the same parameters and buffers.

    Attributes:
        calls: the calls of the function.
        operands: the operands that they share.
        reads: operand -> path of the parameter or buffer.
        owner: path of the module that holds all of these.
        mode: the `training` argument of all calls if it is constant; None if it is the module's flag.
    """

    calls: tuple[fx.Node, ...]
    operands: dict[str, Any]
    reads: dict[str, str]
    owner: str
    mode: bool | None


def modularize_norms(gm: fx.GraphModule) -> int:
    """Turns calls of batch_norm on tensors of one module into calls of a BatchNorm; returns how many."""
    calls: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if is_norm_call(node) and _outputs(node) is not None:
            key = tuple(sorted((k, str(v)) for k, v in _identity(node).items()))
            calls.setdefault(key, []).append(node)
    sites = [site for group in calls.values() if (site := _match(gm, group)) is not None]
    return sum(_rewrite(gm, site, path) for site in sites if (path := _place(gm, site)) is not None)


def _identity(node: fx.Node) -> dict[str, Any]:
    """Operands without the mode, with reads of parameters replaced by their paths."""
    given = {key: value for key, value in norm_operands(node).items() if key != "training"}
    return {key: v.target if isinstance(v, fx.Node) and v.op == "get_attr" else v for key, v in given.items()}


def _outputs(node: fx.Node) -> list[fx.Node] | None:
    """The nodes that hold the normalized values; None if saved statistics are read as well."""
    if operator_name(node) in ("batch_norm", "instance_norm"):
        return [node]
    others = [user for user in node.users if user.target is not operator.getitem or user.args[1] != 0]
    return None if any(user.users or user.op == "output" for user in others) else list(node.users)


def _match(gm: fx.GraphModule, calls: list[fx.Node]) -> _Site | None:
    given = norm_operands(calls[0])
    reads = {key: given[key] for key in _TENSORS if given.get(key) is not None}
    if any(not isinstance(node, fx.Node) or node.op != "get_attr" for node in reads.values()):
        return None
    paths = {key: str(node.target) for key, node in reads.items()}
    owners = {path.rpartition(".")[0] for path in paths.values()}
    modes = [norm_operands(call).get("training", False) for call in calls]
    if len(owners) != 1 or not all(_is_mode(gm, mode) for mode in modes):
        return None
    owner = owners.pop()
    written = {None if isinstance(mode, fx.Node) else bool(mode) for mode in modes}
    if len(written) > 1 and (True in written or gm.get_submodule(owner).training):
        return None  # one BatchNorm has one mode
    return _Site(tuple(calls), given, paths, owner, written.pop() if len(written) == 1 else None)


def _is_mode(gm: fx.GraphModule, value: Any) -> bool:
    if isinstance(value, fx.Node):
        return isinstance(called_module(gm, value), ReadTraining)
    return isinstance(value, bool | int)


def _own_all(gm: fx.GraphModule, site: _Site) -> bool:
    """Whether only the calls of `site` read its tensors, which must be vectors of equal length."""
    values = {path: _value(gm, path) for path in site.reads.values()}
    paths = [name for name, value in _tensors(gm) if any(value is own for own in values.values())]
    alone = len(paths) == len(values) == len(site.reads) and site.owner not in module_calls(gm)
    readers = {user for node in _get_attrs(gm, *values) for user in node.users}
    return alone and readers <= set(site.calls) and len({value.shape for value in values.values()}) == 1


def _value(gm: fx.GraphModule, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value: Tensor = getattr(gm.get_submodule(owner), name)
    return value


def _tensors(gm: fx.GraphModule) -> list[tuple[str, Tensor]]:
    parameters, buffers = gm.named_parameters, gm.named_buffers
    return [*parameters(remove_duplicate=False), *buffers(remove_duplicate=False)]


def _get_attrs(gm: fx.GraphModule, *paths: str) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "get_attr" and str(node.target) in paths]


def _place(gm: fx.GraphModule, site: _Site) -> str | None:
    """The path of a BatchNorm that computes what `site` does, created if needed; None if impossible."""
    module = _norm_of(gm, site)
    if module is None:
        return None
    holder = gm.get_submodule(site.owner)
    follows = site.mode is None or not module.track_running_stats
    like_holder = type(holder) is type(module) and not has_hooks(holder)
    if like_holder and (follows or site.owner in module_calls(gm)):
        usual = all(path == f"{site.owner}.{key}" for key, path in site.reads.items())
        same = usual and str(holder) == str(module) and (follows or site.mode == holder.training)
        return site.owner if same else None
    if not _own_all(gm, site):
        return None
    if site.mode is not None and not follows:
        module = FixedMode.of(module, site.mode)
    inside = f"{site.owner}."
    own = {*_get_attrs(gm, *site.reads.values()), *_flags(site)}
    others = [n for n in gm.graph.nodes if n.op == "call_module" or (n.op == "get_attr" and n.users)]
    if site.owner and not any(str(n.target).startswith(inside) for n in others if n not in own):
        gm.set_submodule(site.owner, module)  # weight and bias keep their names
        return site.owner
    for path in site.reads.values():
        delattr(holder, path.rpartition(".")[2])
    return add_module(gm, f"{inside}norm" if site.owner else "norm", module)


def _flags(site: _Site) -> set[fx.Node]:
    """The reads of the training flag that only `site` uses."""
    modes = [norm_operands(call).get("training") for call in site.calls]
    return {m for m in modes if isinstance(m, fx.Node) and m.users.keys() <= set(site.calls)}


def _rewrite(gm: fx.GraphModule, site: _Site, path: str) -> int:
    flags = _flags(site)
    for call in site.calls:
        _call_instead(gm, call, path)
    for node in [*flags, *gm.graph.find_nodes(op="get_attr")]:
        if not node.users:  # the tensor that it reads may be gone
            gm.graph.erase_node(node)
    return len(site.calls)


def _call_instead(gm: fx.GraphModule, call: fx.Node, path: str) -> None:
    with gm.graph.inserting_after(call):
        new = gm.graph.call_module(path, (input_of(call),))
    new.meta = dict(call.meta)
    for output in _outputs(call) or ():
        output.replace_all_uses_with(new)
    for user in list(call.users):
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def _norm_of(gm: fx.GraphModule, site: _Site) -> _BatchNorm | None:
    """A BatchNorm with the tensors of `site`; None if one of its numbers is unknown."""
    tensors = {key: _value(gm, path) for key, path in site.reads.items()}
    known = {None if (source := input_of(call)) is None else rank(source) for call in site.calls}
    momentum, eps = site.operands.get("momentum", 0.1), site.operands.get("eps", 1e-5)
    if known - {None, *_NORMS} or not tensors or any(isinstance(o, fx.Node) for o in (momentum, eps)):
        return None
    holder = gm.get_submodule(site.owner)
    always = bool(site.mode) and not holder.training  # the statistics of the batch, in eval mode, too
    tracks = "running_mean" in tensors and "running_var" in tensors and not always
    affine = "weight" in tensors or "bias" in tensors
    size = len(next(iter(tensors.values())))
    fitting = {nn.SyncBatchNorm if each is None else _NORMS[each] for each in known}
    cls = fitting.pop() if len(fitting) == 1 else nn.SyncBatchNorm  # which takes any rank
    module = cls(size, eps, momentum, affine, track_running_stats=tracks, device="meta")
    like = next(iter(tensors.values()))
    if affine:
        plain = {"weight": torch.ones_like(like), "bias": torch.zeros_like(like)}
        module._parameters.update({key: _parameter(tensors.get(key, plain[key])) for key in plain})
    if tracks:
        module._buffers.update({key: tensors[key].detach() for key in ("running_mean", "running_var")})
        module._buffers["num_batches_tracked"] = getattr(holder, "num_batches_tracked", torch.tensor(0))
    module.train(holder.training)
    return module


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=False)
