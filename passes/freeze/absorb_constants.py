"""The pass that lets convolutions absorb constant scales and shifts."""

import torch
from torch import Tensor, fx

from pn_compiler.graph.aliases import find_aliases
from pn_compiler.graph.graph_utils import module_calls
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.nn import ConstantAffine
from pn_compiler.passes.absorption import Router, put_before, put_into
from pn_compiler.passes.freeze.split_clips import SplitClips
from pn_compiler.passes.freeze.split_gates import SplitGates


class AbsorbConstants(GraphPass):
    """Lets the convolution before each constant scale and shift, or all of its readers, absorb it.

    Given:   conv(W, b) -> x s + t           Result:  conv(W s, b s + t)
             x s + t -> maxpool -> conv               maxpool -> conv'
             conv(x) -> relu -> x s + t -> add        unchanged; s = 1 or t = 0 is written out
    Leaves alone: those behind an activation, an addition or anything else that is not linear or has other
        readers, if some reader of theirs cannot absorb them either.
    Outputs: preserved to rounding.
    Source: docs/static.md.
    """

    runs_after = (SplitClips, SplitGates)
    preserves_outputs = True

    @torch.no_grad()
    def run(self, gm: fx.GraphModule) -> PassResult:
        rewritten = 0
        overwritten = find_aliases(gm).overwritten
        for path, calls in module_calls(gm).items():
            affine = gm.get_submodule(path)
            if not isinstance(affine, ConstantAffine) or any(len(call.args) > 1 for call in calls):
                continue
            rewritten += affine.scale is None or affine.shift is None
            scale, shift = affine.write_out()  # becomes one operator, which keeps a blocked layout
            for call in calls:
                fixed = call.all_input_nodes[0] in overwritten  # its readers would read it later
                if fixed:
                    continue
                if put_before(gm, call, scale, shift) or _put_behind(gm, call, scale, shift):
                    call.replace_all_uses_with(call.all_input_nodes[0])
                    gm.graph.erase_node(call)
                    rewritten += 1
        return PassResult(rewritten)


def _put_behind(gm: fx.GraphModule, call: fx.Node, scale: Tensor, shift: Tensor) -> bool:
    """Puts the affine of `call` into the linear operators that read it, if each reader is one."""
    route = Router(gm, through_padding=not shift.any()).route(call, len(scale))
    if route.blocked or not route.absorbers:
        return False
    if set(call.users) != set(route.absorbers) and not (scale > 0).all():
        return False  # with an operator in between, such as a max pool, only a positive scale commutes
    for absorber in route.absorbers:
        put_into(gm, absorber, scale, shift)
    return True
