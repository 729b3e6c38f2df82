"""Folds the statistics of the population into normalizers and into what stands before them."""

import torch
from torch import Tensor, fx, nn

from pn_compiler.graph.aliases import find_aliases
from pn_compiler.graph.graph_utils import module_calls, replace_module
from pn_compiler.inspection.fake_tensors import has_values
from pn_compiler.nn import AnchoredNorm, ConstantAffine, FoldedNorm
from pn_compiler.passes.absorption import put_before


@torch.no_grad()
def fold_anchored_norms(gm: fx.GraphModule) -> int:
    """Replaces each AnchoredNorm, exactly; returns how many there were.

    The mean goes into the bias of the layer before, variance and anchor b into epsilon and weight. A constant
    scale and shift, which "rms" with b = 1 is, go into that layer, too. What no layer takes stays.
    Source: docs/method.md, "Anchored statistics".
    """
    rewritten = 0
    overwritten = find_aliases(gm).overwritten
    for path, calls in module_calls(gm).items():
        norm = gm.get_submodule(path)
        if not isinstance(norm, AnchoredNorm):
            continue
        movable = len(calls) == 1 and calls[0].all_input_nodes[0] not in overwritten
        if norm.statistics == "rms":
            _fold_rms(gm, path, norm, calls, movable=movable)
        else:
            replace_module(gm, path, _folded_anchored(norm))
        rewritten += 1
    return rewritten


def _fold_rms(
    gm: fx.GraphModule, path: str, norm: AnchoredNorm, calls: list[fx.Node], *, movable: bool
) -> None:
    var, anchor, mean = norm.constants()
    assert mean is not None
    repeats = norm.num_channels // norm.num_groups
    mean = mean.repeat_interleave(repeats)
    if has_values(anchor) and (anchor == 1).all():
        scale = norm.weight.double() / (var + norm.eps).sqrt().repeat_interleave(repeats)
        shift = norm.bias.double() - mean * scale
        if movable and put_before(gm, calls[0], scale, shift):
            calls[0].replace_all_uses_with(calls[0].all_input_nodes[0])
            gm.graph.erase_node(calls[0])
        else:
            replace_module(gm, path, ConstantAffine(scale.to(norm.weight.dtype), shift.to(norm.weight.dtype)))
        return
    is_zero = has_values(mean) and not mean.any()
    if is_zero or (movable and put_before(gm, calls[0], torch.ones_like(mean), -mean)):
        mean = None
    replace_module(gm, path, _folded(norm, mean, centered=False))


def _folded_anchored(norm: AnchoredNorm) -> nn.GroupNorm | FoldedNorm:
    """A plain GroupNorm, if one epsilon will do for all groups."""
    var, anchor, _ = norm.constants()
    eps = (anchor * var + norm.eps) / (1 - anchor)
    if not has_values(eps) or not (anchor < 1).all() or not (eps == eps[0]).all():
        return _folded(norm, None, centered=True)
    new = nn.GroupNorm(
        norm.num_groups, norm.num_channels, float(eps[0]), device=norm.weight.device, dtype=norm.weight.dtype
    )
    weight = norm.weight.double() / (1 - anchor).sqrt().repeat_interleave(
        norm.num_channels // norm.num_groups
    )
    new.weight.copy_(weight)
    new.bias.copy_(norm.bias)
    return new


def _folded(norm: AnchoredNorm, shift: Tensor | None, *, centered: bool) -> FoldedNorm:
    """The normalizer with its anchor in epsilon and weight, as far as it is below 1."""
    var, anchor, _ = norm.constants()
    share: Tensor | None = 1 - anchor
    eps, weight = anchor * var + norm.eps, norm.weight.double()
    if not has_values(anchor) or (anchor < 1).all():
        assert share is not None
        weight = weight / share.sqrt().repeat_interleave(norm.num_channels // norm.num_groups)
        eps, share = eps / share, None
    dtype = norm.weight.dtype
    return FoldedNorm(
        norm.num_groups,
        norm.num_channels,
        centered=centered,
        share=None if share is None else share.to(dtype),
        var=eps.to(dtype),
        shift=None if shift is None else shift.to(dtype),
        weight=weight.to(dtype),
        bias=norm.bias.detach().clone(),
    )
