"""The pass that turns functional and fused layers into torch.nn modules."""

from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pn_compiler.graph.graph_utils import (
    add_module,
    attribute_of,
    call_module_after,
    module_calls,
    replace_module,
)
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.inspection.batch_norms import has_plain_forward
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.operators.op_names import counts_batches, operands, operator_name
from pn_compiler.passes.prepare.norm_calls import modularize_norms

_CONVS: dict[str, type[nn.Module]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_CONV_OPERANDS = ("weight", "bias", "stride", "padding", "dilation", "groups")


class CanonicalizeModules(GraphPass):
    """Turns functional, ATen and fused conv, linear and batch_norm layers into torch.nn modules.

    Given:   F.batch_norm(F.conv2d(x, c.weight), n.running_mean, ...)     Result:  n(c(x))
             timm's BatchNormAct2d(x)                                              act(drop(bn(x)))
             p(x); p.act(x) of a BatchNorm p                                       p(x); p_act(x)
    Leaves alone: calls whose operands are not the parameters of one owner or, for conv and linear, have other
        names (ReplaceBatchNorm reports a batch_norm among them as PN106).
    Outputs: preserved exactly.
    """

    preserves_outputs = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        norms = [path for path, module in gm.named_modules() if has_plain_forward(module)]
        rewritten = sum(_move_parts_out(gm, path) for path in norms)
        for path, calls in module_calls(gm).items():
            if is_fused_norm_act(gm.get_submodule(path)):
                _split(gm, path, calls)
                rewritten += len(calls)
        for node in list(gm.graph.nodes):
            if counts_batches(node) and not node.users:  # belongs to a BatchNorm to be replaced
                gm.graph.erase_node(node)
                rewritten += 1
            elif node.op == "call_function":
                rewritten += _modularize(gm, node)
        return PassResult(rewritten + modularize_norms(gm))


def is_fused_norm_act(module: nn.Module) -> bool:
    """Whether `module` is BatchNorm, dropout and activation in one, like timm's BatchNormAct2d."""
    return (
        isinstance(module, _BatchNorm)
        and type(module).__module__.startswith("timm.layers")
        and isinstance(getattr(module, "act", None), nn.Module)
        and isinstance(getattr(module, "drop", None), nn.Module)
    )


def _split(gm: fx.GraphModule, path: str, calls: list[fx.Node]) -> None:
    fused: Any = gm.get_submodule(path)
    plain = nn.BatchNorm2d(
        fused.num_features,
        fused.eps,
        fused.momentum,
        affine=fused.affine,
        track_running_stats=fused.track_running_stats,
        device="meta",
    )
    plain._parameters.update(fused._parameters)
    plain._buffers.update(fused._buffers)
    replace_module(gm, path, plain)
    parts = {suffix: getattr(fused, suffix) for suffix in ("drop", "act")}
    added = [
        add_module(gm, f"{path}_{suffix}", part)
        for suffix, part in parts.items()
        if not isinstance(part, nn.Identity)
    ]
    for call in calls:
        users, last = list(call.users), call
        for part_path in added:
            last = call_module_after(gm, last, part_path, (last,))
        for user in users:
            user.replace_input_with(call, last)


def _move_parts_out(gm: fx.GraphModule, path: str) -> int:
    """Moves children of the BatchNorm at `path` that the graph itself calls next to it."""
    norm = gm.get_submodule(path)
    parts = list(norm.named_children())
    for name, part in parts:
        old, new = f"{path}.{name}", add_module(gm, f"{path}_{name}", part)
        for node in gm.graph.nodes:
            target = str(node.target)
            if node.op in ("call_module", "get_attr") and (target == old or target.startswith(f"{old}.")):
                node.target = new + target.removeprefix(old)
        delattr(norm, name)
    return len(parts)


def _modularize(gm: fx.GraphModule, node: fx.Node) -> int:
    name = operator_name(node)
    if name in _CONVS:
        given = operands(node, *_CONV_OPERANDS)
        return _replace_by_module(gm, node, given, _conv_like(gm, _CONVS[name], given))
    if name == "linear":
        given = operands(node, "weight", "bias")
        weight = _tensor(gm, given.get("weight"))
        layer = (
            None
            if weight is None
            else nn.Linear(
                weight.shape[1], weight.shape[0], bias=given.get("bias") is not None, device="meta"
            )
        )
        return _replace_by_module(gm, node, given, layer)
    return 0


def _conv_like(gm: fx.GraphModule, cls: type[nn.Module], given: dict[str, Any]) -> nn.Module | None:
    weight = _tensor(gm, given.get("weight"))
    if weight is None:
        return None
    options = {k: given[k] for k in ("stride", "padding", "dilation", "groups") if k in given}
    if any(isinstance(o, fx.Node) for o in options.values()):
        return None
    spatial = weight.dim() - 2
    for key in ("stride", "padding", "dilation"):
        value = options.get(key)
        if isinstance(value, list | tuple):
            options[key] = tuple(value) * (spatial if len(value) == 1 else 1)
    groups = options.get("groups", 1)
    return cls(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        bias=given.get("bias") is not None,
        device="meta",
        **options,
    )


def _tensor(gm: fx.GraphModule, operand: Any) -> torch.Tensor | None:
    """The parameter or buffer that `operand` reads, or None."""
    return attribute_of(gm, operand) if isinstance(operand, fx.Node) else None


def _replace_by_module(
    gm: fx.GraphModule, node: fx.Node, given: dict[str, Any], module: nn.Module | None
) -> int:
    """Puts `module`, with the tensors in `given`, at the path that owns them, and calls it instead."""
    if module is None or not node.args:
        return 0
    tensors = {key: value for key, value in given.items() if isinstance(value, fx.Node)}
    owner = _common_owner(gm, tensors)
    if owner is None:
        return 0
    holder = gm.get_submodule(owner)
    if type(holder) is nn.Module:  # the container that tracing or exporting made for the parameters
        module.train(holder.training)
        for key in tensors:
            module._parameters[key] = getattr(holder, key)
        gm.set_submodule(owner, module)
    elif (
        type(holder) is not type(module)
        or holder.extra_repr() != module.extra_repr()
        or has_hooks(holder)  # the function does not call them
    ):
        return 0
    with gm.graph.inserting_after(node):
        call = gm.graph.call_module(owner, (node.args[0],))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)
    return 1


def _common_owner(gm: fx.GraphModule, tensors: dict[str, fx.Node]) -> str | None:
    """The path that owns exactly `tensors`, under their usual names; else None."""
    owners = set()
    for key, node in tensors.items():
        owner, _, name = str(node.target).rpartition(".")
        if node.op != "get_attr" or name != key or not owner:
            return None
        owners.add(owner)
    if len(owners) != 1:
        return None
    holder = gm.get_submodule(owner := owners.pop())
    held = {*holder._parameters, *holder._buffers} - {"num_batches_tracked"}
    present = {key for key in held if getattr(holder, key) is not None}
    return owner if present == set(tensors) and not list(holder.children()) else None
