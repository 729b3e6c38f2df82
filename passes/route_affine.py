"""The pass that lets consumers absorb the scale and shift of a site."""

from torch import fx

from pn_compiler.graph.graph_utils import add_module, call_module_after, module_calls
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.nn import INPUT_AFFINE, ChannelAffine, Output, ProxyNormAct
from pn_compiler.passes.absorption import Route, Router, gate_of
from pn_compiler.passes.convert.insert_proxy_norm import InsertProxyNorm
from pn_compiler.passes.site_outputs import read_outputs, site_outputs


class RouteAffine(GraphPass):
    """Moves z = a r + v from a site into the linear operators that read it, or right before other readers.

    Given:   z = ProxyNormAct(x); conv(maxpool(z)); z + y
    Result:  a, r, v = ProxyNormAct(x); InputAffineConv(maxpool(a), r, v); ChannelAffine(a, r, v) + y
    Given:   z * sigmoid(conv(mean(z)))              Result:  ChannelAffine(a, r, v, sigmoid(...))
    Leaves alone: sites without a consumer that could absorb it.
    Outputs: preserved to rounding, but with ``through_padding`` a zero-padded operator pads a, not z.
    Source: docs/method.md, "Where the padding stands".
    """

    runs_after = (InsertProxyNorm,)

    def __init__(self, *, through_padding: bool) -> None:
        self.through_padding = through_padding
        self.preserves_outputs = not through_padding  # type: ignore[misc]  # depends on the option

    def run(self, gm: fx.GraphModule) -> PassResult:
        rewritten = 0
        router = Router(gm, through_padding=self.through_padding)
        for path, calls in module_calls(gm).items():
            site = gm.get_submodule(path)
            if not isinstance(site, ProxyNormAct) or "output" not in site.outputs:
                continue
            starts = {call: site_outputs(gm, call)["output"] for call in calls}
            routes = [router.route(z, site.num_channels) for reads in starts.values() for z in reads]
            if any(route.absorbers for route in routes):
                _open(gm, path, site, calls, routes, router)
                rewritten += 1
        return PassResult(rewritten)


def _open(
    gm: fx.GraphModule, path: str, site: ProxyNormAct, calls: list[fx.Node], routes: list[Route],
    router: Router,
) -> None:  # fmt: skip
    """Makes the site return activation, scale and shift, and connects them to where the routes end."""
    before = {call: site_outputs(gm, call) for call in calls}
    had_affine = "affine" in site.outputs
    remaining = iter(routes)
    outputs: tuple[Output, ...] = ("activation", "scale", "shift")
    site.outputs = (*outputs, "affine") if had_affine else outputs
    if site.scales_affine:
        site.outputs = ("activation", "shift")
    for call, old in before.items():
        values = read_outputs(gm, call)
        scale, shift = values.get("scale"), values["shift"]
        for z in old["output"]:
            route = next(remaining)
            _redirect(z, values["activation"], keep=set(values.values()))
            for absorber in route.absorbers:
                absorber.args = (absorber.args[0], scale, shift)
                module = gm.get_submodule(str(absorber.target))
                # a subclass that adds no state: names, hooks and options of the module stay
                module.__class__ = INPUT_AFFINE.get(type(module), type(module))
            apply_where_blocked(gm, path, route, z, values, router)
        for affine in old.get("affine", ()):
            _redirect(affine, values["affine"], keep=set())


def _redirect(old: fx.Node, new: fx.Node, *, keep: set[fx.Node]) -> None:
    """Users of `old` read `new`, except those in `keep`."""
    for user in list(old.users):
        if user not in keep:
            user.replace_input_with(old, new)


def apply_where_blocked(
    gm: fx.GraphModule, path: str, route: Route, z: fx.Node, values: dict[Output, fx.Node],
    router: Router,
) -> None:  # fmt: skip
    applied: dict[fx.Node, fx.Node] = {}
    for blocked in route.blocked:
        value = values["activation"] if blocked.value is z else blocked.value
        affine = (values.get("scale"), values["shift"])
        # all readers of a pinned value must read the same tensor
        gate = None if blocked.value in router.pinned else gate_of(gm, blocked.user, value)
        if gate is not None:
            at = add_module(gm, f"{path}_gated", ChannelAffine())
            node = call_module_after(gm, blocked.user, at, (value, *affine, gate))
            blocked.user.replace_all_uses_with(node)
            gm.graph.erase_node(blocked.user)
            continue
        if value not in applied:
            at = add_module(gm, f"{path}_affine", ChannelAffine())
            last = value if value is not values["activation"] else values["shift"]
            node = call_module_after(gm, last, at, (value, *affine))
            node.meta = dict(value.meta)
            applied[value] = node
        blocked.user.replace_input_with(value, applied[value])
