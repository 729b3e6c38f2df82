"""The pass that restores the plain activation of frozen sites."""

import torch
from torch import fx, nn

from pn_compiler.graph.graph_utils import (
    add_module,
    call_module_after,
    called_module,
    module_calls,
    replace_module,
)
from pn_compiler.graph.pass_base import GraphPass, PassResult
from pn_compiler.nn import ConstantAffine, ConstantClamp
from pn_compiler.passes.freeze.freeze_normalizers import FreezeNormalizers


class SplitClips(GraphPass):
    """Turns a clip with bounds per channel behind a frozen normalizer into ReLU or ReLU6 and an affine.

    Given:   max(x s + t, l)                 Result:  relu(x s + t - l) + l
             clip(x s + t, l, h)                      relu6((x s + t - l) / r) r + l with r = (h - l) / 6
    The first affine goes into a convolution. Runtimes fuse a plain activation with that, but not one whose
    bounds are tensors.
    Leaves alone: clips behind a normalizer that is not frozen, where they save the second affine.
    Outputs: preserved to rounding.
    Source: docs/static.md.
    """

    requires = (FreezeNormalizers,)
    preserves_outputs = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        calls = module_calls(gm)
        rewritten = 0
        for path, clips in calls.items():
            clamp = gm.get_submodule(path)
            if not isinstance(clamp, ConstantClamp) or clamp.lower is None:
                continue
            before = [clip.all_input_nodes[0] for clip in clips]
            if all(_is_own_affine(gm, affine, calls) for affine in before):
                _split(gm, path, clips, clamp)
                rewritten += 1
        return PassResult(rewritten)


def _is_own_affine(gm: fx.GraphModule, node: fx.Node, calls: dict[str, list[fx.Node]]) -> bool:
    """Whether `node` is a constant affine whose only reader is a clip."""
    plain = isinstance(called_module(gm, node), ConstantAffine) and len(node.args) == 1
    return plain and len(node.users) == 1 and all(len(call.users) == 1 for call in calls[str(node.target)])


def _split(gm: fx.GraphModule, path: str, clips: list[fx.Node], clamp: ConstantClamp) -> None:
    assert clamp.lower is not None
    lower = clamp.lower
    scale = torch.ones_like(lower) if clamp.upper is None else (clamp.upper - lower) / 6
    for affine_path in {str(clip.all_input_nodes[0].target) for clip in clips}:
        affine = gm.get_submodule(affine_path)
        assert isinstance(affine, ConstantAffine)
        assert affine.scale is not None
        assert affine.shift is not None
        inner = ConstantAffine(affine.scale / scale, (affine.shift - lower) / scale)
        replace_module(gm, affine_path, inner)
    replace_module(gm, path, nn.ReLU() if clamp.upper is None else nn.ReLU6())
    outer_path = add_module(gm, f"{path}_affine", ConstantAffine(scale, lower).eval())
    for clip in clips:
        outer = call_module_after(gm, clip, outer_path, (clip,))
        for user in [user for user in clip.users if user is not outer]:
            user.replace_input_with(clip, outer)
