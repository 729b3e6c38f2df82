"""Puts the sites of a converted network into another graph of the same network."""

import copy

from torch import Tensor, fx, nn

from pn_compiler.base.errors import TraceError
from pn_compiler.graph.graph_utils import add_module, call_module_after, called_module, module_calls
from pn_compiler.inspection.batch_norms import is_batch_norm
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.nn import INPUT_AFFINE, Output, ProxyNormAct
from pn_compiler.operators.activations import is_activation
from pn_compiler.operators.op_names import reads_shape
from pn_compiler.parts.structure import module_at
from pn_compiler.passes.absorption import Router, commutes
from pn_compiler.passes.route_affine import apply_where_blocked
from pn_compiler.passes.site_outputs import read_outputs


class NormalizedOnly(nn.Module):
    """The output of a site before its activation.

    Args:
        site: called nowhere else in the graph that holds this.
    """

    def __init__(self, site: ProxyNormAct) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return self.site.normalize(x, self.site.weight, self.site.bias)


def follow_sites(gm: fx.GraphModule, converted: nn.Module, *, strictly: bool) -> None:
    """Replaces each BatchNorm of `gm`, a prepared graph, by what `converted` has in its place.

    Raises:
        TraceError: something else follows a site than in `converted`.
    """
    opened: list[tuple[str, dict[Output, fx.Node]]] = []
    for path, calls in module_calls(gm).items():
        module = gm.get_submodule(path)
        own = module_at(converted, path)
        if isinstance(module, ProxyNormAct):
            for call in calls:
                values = _put_site(gm, path, module, call, strictly=strictly)
                if values is not None and "shift" in values:
                    opened.append((path, values))
        elif is_batch_norm(module) and own is not module:
            raise TraceError(f"{path} is not part of the converted network")
    router = _OpenRouter(gm, through_padding=True)
    for path, values in opened:
        site = gm.get_submodule(path)
        assert isinstance(site, ProxyNormAct)
        start = values["activation"]
        route = router.route(start, site.num_channels)
        for absorber in route.absorbers:
            absorber.args = (absorber.args[0], values.get("scale"), values["shift"])
        apply_where_blocked(gm, path, route, start, values, router)


def _put_site(
    gm: fx.GraphModule, path: str, site: ProxyNormAct, call: fx.Node, *, strictly: bool
) -> dict[Output, fx.Node] | None:
    """Lets one call of a site stand for the BatchNorm and the activation behind it; returns its outputs."""
    activations = [user for user in call.users if _is_own_activation(gm, user, site)]
    others = [user for user in call.users if user not in activations]
    if "affine" not in site.outputs and others:
        others = [user for user in others if not reads_shape(user)]
        if others and (strictly or not all(_only_moves(gm, user) for user in others)):
            raise TraceError(
                f"something else follows the site {path} than in the network that was converted, "
                f"{type(site.activation).__name__}"
            )
        if others:
            at = add_module(gm, f"{path}_before_activation", NormalizedOnly(site))
            before = call_module_after(gm, call, at, tuple(call.all_input_nodes[:1]))
            for user in others:
                user.replace_input_with(call, before)
        if not activations:
            return None
    values = read_outputs(gm, call)
    for user in others if "affine" in site.outputs else ():
        user.replace_input_with(call, values["affine"])
    for activation in activations:
        activation.replace_all_uses_with(values.get("output") or values["activation"])
        gm.graph.erase_node(activation)
    return values


def _is_own_activation(gm: fx.GraphModule, node: fx.Node, site: ProxyNormAct) -> bool:
    module = called_module(gm, node)
    own = site.activation
    return (
        module is not None
        and is_activation(module)
        and not has_hooks(module)
        and type(module) is type(own)
        and _options(module) == _options(own)
    )


def _options(activation: nn.Module) -> str:
    """The options of an activation, but for working in place, which that of a site does not."""
    activation = copy.copy(activation)
    if hasattr(activation, "inplace"):
        activation.inplace = False  # type: ignore[assignment]  # a bool, typed for tensors
    return activation.extra_repr()


def _only_moves(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` and all that reads it only bring the value to an output of the graph."""
    if node.op == "output" or reads_shape(node):
        return True
    source = node.args[0] if node.args else None
    return (
        isinstance(source, fx.Node)
        and commutes(gm, node, source, through_padding=True)
        and all(_only_moves(gm, user) for user in node.users)
    )


class _OpenRouter(Router):
    """Finds the consumers that already absorb: nothing is written into weights any more."""

    def refusal(self, user: fx.Node, value: fx.Node, num_channels: int) -> str | None:
        module = called_module(self.gm, user)
        if not isinstance(module, tuple(INPUT_AFFINE.values())) or user.args != (value,) or user.kwargs:
            return f"{user.target} reads it"
        if isinstance(module, nn.Linear):
            fits = module.in_features % num_channels == 0
        else:
            fits = getattr(module, "in_channels", 0) == num_channels
        return None if fits else f"{user.target} reads other channels"
