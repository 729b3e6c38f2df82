"""The pass that adds proxy normalization wherever an activation follows a normalizer."""

import copy
import dataclasses

import torch
from torch import fx, nn

from pn_compiler.base.config import TransformConfig
from pn_compiler.base.diagnostics import Diagnostic, Site
from pn_compiler.graph.aliases import find_aliases
from pn_compiler.graph.graph_utils import called_module, module_calls, replace_module
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.graph.site_table import site_table, update_site
from pn_compiler.inspection.fake_tensors import has_values
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.nn import AnchoredNorm, Normalizer, ProxyNormAct
from pn_compiler.numerics.affine import absorb_affine
from pn_compiler.operators.activations import activation_name, is_activation, same_activation
from pn_compiler.passes.absorption import Route, Router
from pn_compiler.passes.convert.replace_batch_norm import ReplaceBatchNorm
from pn_compiler.passes.prepare.canonicalize_activations import CanonicalizeActivations
from pn_compiler.passes.site_outputs import read_outputs


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """One call of a normalizer, and of the activation on its path."""

    norm: fx.Node
    activation: fx.Node


class InsertProxyNorm(GraphPass):
    """Replaces normalizer + activation by a ProxyNormAct; in a warm start its consumers undo it.

    Given:   gn(C) -> act -> conv(W, b)
    Result:  ProxyNormAct(C) -> conv(W / r, b + sum of W mean), with z = (act - mean) r
    Leaves alone: PN201 no activation, PN202 a consumer that cannot undo it (not with warm_start="none"),
        PN203 not asked for, PN204 one normalizer with different activations behind it, PN208 several
        activations.
    Outputs: preserved to rounding in a warm start (but see PN207), else changed on purpose.
    Source: Labatie et al., NeurIPS 2021, section 5; docs/method.md, "Keeping the function".
    """

    requires = (ReplaceBatchNorm, CanonicalizeActivations)

    def __init__(self, config: TransformConfig) -> None:
        self.config = config

    def run(self, gm: fx.GraphModule) -> PassResult:
        calls = module_calls(gm)
        # Any padding will do: compensation is exact with the padding before the shift, and the best possible
        # with the reference's.
        router = Router(gm, through_padding=True)
        pinned = find_aliases(gm).pinned
        notes = []
        rewritten = 0
        for name, site in list(site_table(gm).items()):
            if site.kind != "norm_only":
                continue  # left alone, or a ProxyNormAct already
            matched = _match(gm, calls.get(name, []), name, pinned)
            refusal = matched if isinstance(matched, Diagnostic) else None
            if not isinstance(matched, Diagnostic):
                act = called_module(gm, matched[0].activation)
                assert act is not None
                update_site(gm, name, activation=activation_name(act))
                refusal = self._try_rewrite(gm, site, matched, act, router)
                rewritten += refusal is None or refusal.code == "PN207"
            if refusal is not None:
                notes.append(refusal)
                update_site(gm, name, refusal)
            self._drop_bias(gm, name)
        return PassResult(rewritten, tuple(notes))

    def _drop_bias(self, gm: fx.GraphModule, name: str) -> None:
        """Drops the bias, as the reference does at norm-only sites that start from scratch."""
        site = site_table(gm)[name]
        if site.kind == "norm_only" and not site.warm_start and not self.config.norm_only_bias:
            norm = gm.get_submodule(name)
            assert isinstance(norm, nn.GroupNorm | Normalizer)
            nn.init.zeros_(norm.bias).requires_grad_(False)

    def _try_rewrite(
        self, gm: fx.GraphModule, site: Site, calls: list[_Call], act: nn.Module, router: Router
    ) -> Diagnostic | None:
        """Rewrites the site, or says why not; PN207 is a note about a rewritten site."""
        if not self.config.proxy:
            return Diagnostic("PN203", site.name, "proxy normalization is switched off")
        norm = gm.get_submodule(site.name)
        assert isinstance(norm, nn.GroupNorm | AnchoredNorm)
        remark = None
        routes: list[Route] = []
        if self.config.warm_start != "none":  # whether it was trained must not change the structure
            routes = [router.route(c.activation, norm.num_channels) for c in calls]
            if reasons := _blocked(routes):
                message = f"no proxy normalization in a warm start: {reasons}"
                hint = "warm_start='none' inserts it and trains from scratch"
                return Diagnostic("PN202", site.name, message, hint)
            if self.config.proxy_padding == "output":
                remark = _inexact(gm, site.name, norm, calls)
        proxy_norm = _proxy_norm_act(norm, act, self.config.proxy_eps)
        for route in routes:
            for absorber in route.absorbers:
                consumer = gm.get_submodule(str(absorber.target))
                with_bias(consumer)
                if site.warm_start:
                    compensate(consumer, proxy_norm)
        _replace(gm, site.name, calls, proxy_norm)
        update_site(gm, site.name, kind="pn")
        return remark


def _match(
    gm: fx.GraphModule, norms: list[fx.Node], name: str, pinned: frozenset[fx.Node]
) -> list[_Call] | Diagnostic:
    """Pairs each call of one normalizer with the activation behind it, or says why that is impossible."""
    if not norms:
        return Diagnostic("PN102", name, "nothing reads its output in the traced forward")
    if not pinned.isdisjoint(norms):
        return Diagnostic("PN201", name, "its output is overwritten, and read through another view of it")
    matched: list[_Call | None] = []
    for norm in norms:
        activations = [user for user in norm.users if _is_activation_call(gm, user)]
        if len(activations) > 1:
            names = ", ".join(str(a.target) for a in activations)
            return Diagnostic("PN208", name, f"several activations read it: {names}")
        matched.append(_Call(norm, activations[0]) if activations else None)
    calls = [call for call in matched if call is not None]
    if not calls:
        return Diagnostic("PN201", name, "no activation follows")
    modules = [called_module(gm, call.activation) for call in calls]
    first = modules[0]
    same = all(m is not None and first is not None and same_activation(first, m) for m in modules)
    if len(calls) != len(matched) or not same:
        return Diagnostic("PN204", name, "it is shared, and different things follow its calls")
    return calls


def _is_activation_call(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is an activation that a site may include."""
    module = called_module(gm, node)
    return module is not None and is_activation(module) and not has_hooks(module)


def _blocked(routes: list[Route]) -> str:
    """Why the routes are blocked, each reason once; empty if they are not."""
    return "; ".join(dict.fromkeys(b.reason for route in routes for b in route.blocked))


def _inexact(
    gm: fx.GraphModule, name: str, norm: nn.GroupNorm | AnchoredNorm, calls: list[_Call]
) -> Diagnostic | None:
    """A diagnostic if some consumer pads with zeros behind the shift."""
    router = Router(gm, through_padding=False)
    reasons = _blocked([router.route(c.activation, norm.num_channels) for c in calls])
    if not reasons:
        return None
    return Diagnostic(
        "PN207",
        name,
        f"proxy_padding='output': the warm start is inexact at the border, {reasons}",
        "proxy_padding='activation' is exact",
    )


def _proxy_norm_act(norm: nn.GroupNorm | AnchoredNorm, act: nn.Module, proxy_eps: float) -> ProxyNormAct:
    """A ProxyNormAct with the parameters and buffers of `norm`, in its dtype and on its device."""
    if not list(act.parameters()):
        act = copy.deepcopy(act)
        if hasattr(act, "inplace"):
            act.inplace = False  # type: ignore[assignment]  # a bool, typed for tensors
    new = ProxyNormAct(
        norm.num_groups,
        norm.num_channels,
        act,
        norm.eps,
        proxy_eps,
        statistics="group" if isinstance(norm, nn.GroupNorm) else norm.statistics,
        device=norm.weight.device,
        dtype=norm.weight.dtype,
    )
    new.weight, new.bias = norm.weight, norm.bias
    if isinstance(norm, AnchoredNorm):
        new.share_population(norm)
    new.proxy_weight.requires_grad_(norm.weight.requires_grad)
    new.proxy_bias.requires_grad_(norm.bias.requires_grad)
    return new


def with_bias(consumer: nn.Module) -> None:
    """Gives a consumer that has no bias one of 0."""
    assert isinstance(consumer, nn.Linear | nn.modules.conv._ConvNd)
    if consumer.bias is None:
        consumer.bias = nn.Parameter(
            consumer.weight.new_zeros(consumer.weight.shape[0]), consumer.weight.requires_grad
        )


@torch.no_grad()
def compensate(consumer: nn.Module, site: ProxyNormAct) -> None:
    """Undoes z = a r + v in a consumer: W' = W / r and b' = b - sum of W' v = b + sum of W mean."""
    assert isinstance(consumer, nn.Linear | nn.modules.conv._ConvNd)
    assert consumer.bias is not None
    if not has_values(consumer.weight):
        return  # no values to change
    scale, shift = site.scale_and_shift(torch.float64)
    groups = getattr(consumer, "groups", 1)
    repeats = consumer.weight.shape[1] * groups // scale.shape[0]  # above 1 behind a flatten
    weight, bias = absorb_affine(
        consumer.weight.double(),
        consumer.bias.double(),
        scale.reciprocal().repeat_interleave(repeats),
        (-shift / scale).repeat_interleave(repeats),
        groups,
    )
    assert bias is not None
    consumer.weight.copy_(weight)
    consumer.bias.copy_(bias)


def _replace(gm: fx.GraphModule, path: str, calls: list[_Call], new: ProxyNormAct) -> None:
    """Puts `new` at `path`; users other than the activation keep reading the affine output."""
    others = {c.norm: [user for user in c.norm.users if user is not c.activation] for c in calls}
    if any(others.values()):
        new.outputs = ("output", "affine")
    replace_module(gm, path, new)
    for call in calls:
        values = read_outputs(gm, call.norm)
        call.activation.replace_all_uses_with(values["output"])
        gm.graph.erase_node(call.activation)
        for user in others[call.norm]:
            user.replace_input_with(call.norm, values["affine"])
