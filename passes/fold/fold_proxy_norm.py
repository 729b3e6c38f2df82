"""The pass that turns proxy statistics into constants and folds them away."""

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.base.errors import PostconditionError
from pn_compiler.graph.graph_utils import (
    add_module,
    call_module_after,
    called_module,
    module_calls,
    replace_module,
)
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.nn import (
    INPUT_AFFINE,
    AnchoredNorm,
    ChannelAffine,
    ConstantAffine,
    ConstantClamp,
    InputAffineLinear,
    Normalizer,
    Output,
    ProxyNormAct,
)
from pn_compiler.nn.consumers import MEMO
from pn_compiler.numerics.affine import absorb_affine
from pn_compiler.operators.activations import clip_bounds
from pn_compiler.passes.absorption import set_weight_and_bias
from pn_compiler.passes.fold.anchored_norms import fold_anchored_norms
from pn_compiler.passes.route_affine import RouteAffine
from pn_compiler.passes.site_outputs import chain_between, site_outputs, where_it_went

_PLAIN = {folded: plain for plain, folded in INPUT_AFFINE.items()}


class FoldProxyNorm(GraphPass):
    """Evaluates the proxy statistics, and folds them into normalizers, bounds, weights and biases.

    Given:   a, r, v = ProxyNormAct(x); InputAffineConv(a, r, v)      Result:  conv'(act(gn'(x)))
             z = ProxyNormAct(x) with ReLU                                     max(gn'(x), -mean r)
             z = ProxyNormAct(x), other                                        act(gn(x)) * r + v
             AnchoredNorm(x)                                                   see `fold_anchored_norms`
    Leaves alone: nothing.
    Outputs: preserved to rounding, in eval mode only.
    Source: docs/method.md, "Folding".
    """

    runs_after = (RouteAffine,)
    preserves_outputs = True

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        constants: dict[fx.Node, Tensor] = {}
        notes: list[Diagnostic] = []
        rewritten = 0
        for path, calls in module_calls(gm).items():
            site = gm.get_submodule(path)
            if isinstance(site, ProxyNormAct):
                notes += _notes(gm, path, site, calls)
                _fold_site(gm, path, site, calls, constants)
                rewritten += 1
        for path, calls in module_calls(gm).items():
            module = gm.get_submodule(path)
            if isinstance(module, ChannelAffine):
                _fold_channel_affine(gm, path, calls, constants)
            elif type(module) in _PLAIN:
                _fold_consumer(module, calls, constants)
        return PassResult(rewritten + fold_anchored_norms(gm), tuple(notes))

    def ensures(self, gm: fx.GraphModule) -> None:
        for name in module_calls(gm):  # a region inside a leaf is a separate graph
            module = gm.get_submodule(name)
            if isinstance(module, Normalizer | ChannelAffine) or type(module) in _PLAIN:
                raise PostconditionError(f"{name} ({type(module).__name__}) is not folded")


def _notes(gm: fx.GraphModule, path: str, site: ProxyNormAct, calls: list[fx.Node]) -> list[Diagnostic]:
    """Where scale and shift of the site went: into consumers, before other readers, or nowhere."""
    if "output" in site.outputs:
        bounds = clip_bounds(site.activation) is not None and "affine" not in site.outputs
        return [where_it_went(path, "into its bounds" if bounds else "behind its activation", ())]
    reads = [read for call in calls for read in site_outputs(gm, call).get("shift", ())]
    users = list(dict.fromkeys(user for read in reads for user in read.users))
    into = [user for user in users if type(called_module(gm, user)) in _PLAIN]
    applied = [user for user in users if user not in into]
    gates = [user for user in applied if len(user.args) > 3]
    before = [reader for user in applied if user not in gates for reader in user.users]
    moved = {
        "into": into,
        "before": before,
        "with the gate before": [g for u in gates for g in u.users],
    }
    return [where_it_went(path, how, places) for how, places in moved.items() if places]


def _fold_site(
    gm: fx.GraphModule,
    path: str,
    site: ProxyNormAct,
    calls: list[fx.Node],
    constants: dict[fx.Node, Tensor],
) -> None:
    """Replaces the site by normalizer -> activation -> what remains."""
    scale, shift = site.scale_and_shift(torch.float64)
    whole = "output" in site.outputs
    clamp = _clamp(site, scale, shift) if whole and "affine" not in site.outputs else None
    weight, bias = site.weight.double(), site.bias.double()
    if clamp is not None:
        # (clip(u) - mean) r is the clip of u r - mean r between its own bounds
        weight, bias = weight * scale, bias * scale + shift
    elif site.scales_affine:
        weight, bias = weight * scale, bias * scale
    norm = _normalizer(site)
    norm.weight.copy_(weight)
    norm.bias.copy_(bias)
    dtype = site.weight.dtype
    tail: list[nn.Module] = [clamp.to(dtype) if clamp is not None else _pure(site.activation)]
    if whole and clamp is None:
        remaining = None if site.scales_affine else scale.to(dtype)
        tail.append(ConstantAffine(remaining, shift.to(dtype)))
    reads = {call: site_outputs(gm, call) for call in calls}
    replace_module(gm, path, norm)
    paths = [add_module(gm, f"{path}_{type(m).__name__.lower()}", m.eval()) for m in tail]
    for call, old in reads.items():
        for name, value in (("scale", scale), ("shift", shift)):
            constants.update(dict.fromkeys(old.get(name, ()), value))  # type: ignore[call-overload]
        last = call
        for tail_path in paths:
            last = call_module_after(gm, last, tail_path, (last,))
        new: dict[Output, fx.Node] = {"output": last, "activation": last, "affine": call}
        chain = {last, *chain_between(call, last)}
        for name, node in new.items():
            for read in old.get(name, ()):
                for user in [u for u in read.users if u not in chain]:
                    user.replace_input_with(read, node)


def _normalizer(site: ProxyNormAct) -> nn.GroupNorm | AnchoredNorm:
    """The normalizer of the site as a module of its own, with weight 1 and bias 0."""
    options: dict[str, Any] = {"device": site.weight.device, "dtype": site.weight.dtype}
    if site.statistics == "group":
        return nn.GroupNorm(site.num_groups, site.num_channels, site.eps, **options)
    norm = AnchoredNorm(site.num_groups, site.num_channels, site.eps, statistics=site.statistics, **options)
    norm.share_population(site)
    return norm


def _pure(activation: nn.Module) -> nn.Module:
    """Makes `activation` not work in place, because others may read its input."""
    if hasattr(activation, "inplace"):
        activation.inplace = False  # type: ignore[assignment]  # a bool, typed for tensors
    return activation


def _clamp(site: ProxyNormAct, scale: Tensor, shift: Tensor) -> ConstantClamp | None:
    """The whole tail of a site whose activation is a clip, as one clip with bounds per channel."""
    bounds = clip_bounds(site.activation)
    if bounds is None:
        return None
    lower, upper = (bound * scale + shift if math.isfinite(bound) else None for bound in bounds)
    return ConstantClamp(lower, upper)


def _constant(operand: object, constants: dict[fx.Node, Tensor]) -> Tensor | None:
    return constants[operand] if isinstance(operand, fx.Node) else None


def _fold_channel_affine(
    gm: fx.GraphModule, path: str, calls: list[fx.Node], constants: dict[fx.Node, Tensor]
) -> None:
    for call in calls:  # a single one: every ChannelAffine is added for one place
        scale, shift = (_constant(operand, constants) for operand in call.args[1:3])
        dtype = next((p.dtype for p in gm.parameters()), torch.float32)
        replace_module(
            gm,
            path,
            ConstantAffine(
                None if scale is None else scale.to(dtype),
                None if shift is None else shift.to(dtype),
            ),
        )
        call.args = (call.args[0], *call.args[3:])


def _fold_consumer(module: nn.Module, calls: list[fx.Node], constants: dict[fx.Node, Tensor]) -> None:
    assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    (call,) = calls  # absorbers have one call site
    scale, shift = (_constant(operand, constants) for operand in call.args[1:])
    if isinstance(module, InputAffineLinear):
        scale, shift = module.per_feature(scale), module.per_feature(shift)
    weight, bias = absorb_affine(
        module.weight.double(),
        None if module.bias is None else module.bias.double(),
        scale,
        shift,
        getattr(module, "groups", 1),
    )
    set_weight_and_bias(module, weight, bias)
    module.__dict__.pop(MEMO, None)
    module.__class__ = _PLAIN[type(module)]  # type: ignore[assignment]  # the class that it extends
    call.args = call.args[:1]
