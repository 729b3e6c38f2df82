"""The pass that puts constant scales and shifts into the convolutions around them."""

import torch
from torch import Tensor, fx, nn

from pn_compiler.graph.aliases import find_aliases
from pn_compiler.graph.graph_utils import called_module, module_calls
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.graph.ranks import rank
from pn_compiler.nn import ConstantAffine
from pn_compiler.numerics.affine import absorb_output_affine
from pn_compiler.operators.op_names import reads_shape
from pn_compiler.passes.absorption import Router, put_into, set_weight_and_bias
from pn_compiler.passes.freeze.split_clips import SplitClips
from pn_compiler.passes.freeze.split_gates import SplitGates

_PRODUCERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


class AbsorbConstants(GraphPass):
    """Puts each constant scale and shift into the convolution before it, or into all that read it.

    Given:   conv(W, b) -> x s + t           Result:  conv(W s, b s + t)
             x s + t -> maxpool -> conv               maxpool -> conv'
             conv(x) -> relu -> x s + t -> add        unchanged; s = 1 or t = 0 is written out
    Leaves alone: those behind an activation, an addition or anything else that is not linear, or that
        something else reads, if some reader cannot take them in either.
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
            scale, shift = affine.write_out()  # one operator then, which keeps a blocked layout
            for call in calls:
                fixed = call.all_input_nodes[0] in overwritten  # its readers would read it later
                if fixed:
                    continue
                if _put_before(gm, call, scale, shift) or _put_behind(gm, call, scale, shift):
                    call.replace_all_uses_with(call.all_input_nodes[0])
                    gm.graph.erase_node(call)
                    rewritten += 1
        return PassResult(rewritten)


def _put_before(gm: fx.GraphModule, call: fx.Node, scale: Tensor, shift: Tensor) -> bool:
    """Puts the affine of `call` into what it reads, if that is linear and nothing else reads it."""
    producer = call.all_input_nodes[0]
    module = called_module(gm, producer)
    if type(module) not in _PRODUCERS or not all(u is call or reads_shape(u) for u in producer.users):
        return False
    assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    if isinstance(module, nn.Linear) and rank(producer) != 2:  # its outputs are on the last axis
        return False
    if Router(gm, through_padding=False).fixed_weight(producer) is not None:
        return False
    weight, bias = absorb_output_affine(
        module.weight.double(), None if module.bias is None else module.bias.double(), scale, shift,
        groups=getattr(module, "groups", 1), transposed=getattr(module, "transposed", False),
    )  # fmt: skip
    set_weight_and_bias(module, weight, bias)
    return True


def _put_behind(gm: fx.GraphModule, call: fx.Node, scale: Tensor, shift: Tensor) -> bool:
    """Puts the affine of `call` into the linear operators that read it, if each reader is one."""
    route = Router(gm, through_padding=not shift.any()).route(call, len(scale))
    if route.blocked or not route.absorbers:
        return False
    if set(call.users) != set(route.absorbers) and not (scale > 0).all():
        return False  # something lies between, such as a max pool, with which only a positive scale commutes
    for absorber in route.absorbers:
        put_into(gm, absorber, scale, shift)
    return True
