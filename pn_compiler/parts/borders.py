"""Parts that begin with a convolution which pads the output of a site: the network pads with the shift.

In the network zeros are padded before scale and shift of the site are applied: z = a r + v is padded with v.
A part that is called alone gets z. So z - v is padded with zeros, and the convolution applies v behind that,
as it does with any shift: exactly what it computes in the network.
"""

import operator
from collections.abc import Callable

from torch import Tensor, fx, nn

from pn_compiler.base.errors import TraceError
from pn_compiler.graph.graph_utils import add_module, called_module, module_calls
from pn_compiler.nn import INPUT_AFFINE, ProxyNormAct
from pn_compiler.numerics.affine import per_channel
from pn_compiler.passes.absorption import commutes, pads_with_zeros


class Unshifted(nn.Module):
    """The output of a site without its shift, and the shift.

    Args:
        site: not registered, for it is part of another module.
    """

    def __init__(self, site: ProxyNormAct) -> None:
        super().__init__()
        self.sites = (site,)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shift = self.sites[0].compute_affine().shift
        assert shift is not None  # a consumer absorbs it
        return x - per_channel(shift, x).to(x.dtype), shift


def border_sites(gm: fx.GraphModule) -> dict[str, str]:
    """Path of each convolution that pads the output of one site with its shift -> path of that site."""
    found: dict[str, str] = {}
    for path, calls in module_calls(gm).items():
        if _pads(gm.get_submodule(path)):
            sites = {_site_of(gm, call) for call in calls}
            site = sites.pop()
            if site is not None and not sites:
                found[path] = site
    return found


def _site_of(gm: fx.GraphModule, call: fx.Node) -> str | None:
    """The path of the site whose shift the consumer takes in that is called there."""
    shift = call.args[2] if len(call.args) == 3 else None
    if not isinstance(shift, fx.Node) or shift.target is not operator.getitem:
        return None
    source = shift.args[0]
    site = called_module(gm, source) if isinstance(source, fx.Node) else None
    index = shift.args[1]
    if not isinstance(site, ProxyNormAct) or not isinstance(index, int) or site.outputs[index] != "shift":
        return None
    return str(source.target)  # type: ignore[union-attr]  # a node


def open_border(gm: fx.GraphModule, feeding: Callable[[str], ProxyNormAct | None]) -> None:
    """Lets each convolution at the beginning of `gm` pad with the shift of the site that feeds it.

    Raises:
        TraceError: that site is not known, for example because the part was copied out of its network.
    """
    for path, calls in module_calls(gm).items():
        if not _pads(gm.get_submodule(path)):
            continue
        for call in calls:
            if len(call.args) != 1 or not _is_given(gm, call):
                continue
            site = feeding(path)
            if site is None:
                raise TraceError(
                    f"{path} pads its input, which in the network comes straight from a site that it must see"
                )
            at = add_module(gm, f"{path.replace('.', '_')}_border", Unshifted(site))
            with gm.graph.inserting_before(call):
                pair = gm.graph.call_module(at, call.args)
                values = [gm.graph.call_function(operator.getitem, (pair, index)) for index in range(2)]
            call.args = (values[0], None, values[1])


def _pads(module: nn.Module) -> bool:
    absorbs = isinstance(module, tuple(INPUT_AFFINE.values()))
    return absorbs and isinstance(module, nn.modules.conv._ConvNd) and pads_with_zeros(module)


def _is_given(gm: fx.GraphModule, call: fx.Node) -> bool:
    """Whether the input of `call` is an argument of the graph, or one that was only pooled or reshaped."""
    value = call.all_input_nodes[0]
    while value.op != "placeholder":
        source = next(iter(value.all_input_nodes), None)
        if source is None or not commutes(gm, value, source, through_padding=True):
            return False
        value = source
    return True
