"""The public function fold."""

import dataclasses

from torch import nn

from pn_compiler.base.option_checks import check_function
from pn_compiler.graph.graph_module import is_converted, notes, record, remember, sites
from pn_compiler.graph.pass_base import Progress, run_pipeline
from pn_compiler.graph.ranks import infer_ranks
from pn_compiler.inspection.fake_tensors import fake_mode
from pn_compiler.passes import fold_pipeline
from pn_compiler.regions.regions import trace
from pn_compiler.running.copying import copy_model, unwrap
from pn_compiler.running.evaluation import to_eval_mode


def fold(model: nn.Module, *, progress: Progress | None = None) -> nn.Module:
    """Makes the proxy statistics constants and folds them away, for inference.

    What remains is normalizers, activations and linear operators of ``torch.nn``, with the scale and
    shift of proxy normalization in their weights, biases and bounds. The outputs are those of
    ``model.eval()`` to float32 rounding.

    Args:
        model: a result of `transform`, or any module that torch.fx can trace. It is left untouched.

    Returns:
        A torch.fx.GraphModule (see `transform`) in eval mode whose parameters need no gradient. It must
        stay in eval mode.

    Raises:
        TraceError: torch.fx cannot follow the forward of `model`.
    """
    check_function("progress", progress)
    return fold_in_place(copy_model(unwrap(model)), progress=progress)


def fold_in_place(model: nn.Module, *, progress: Progress | None = None) -> nn.Module:
    """`fold` without a copy: `model` cannot be used afterwards."""
    with fake_mode(model):
        traced = trace(to_eval_mode(model), in_place=True)
        went: dict[str, list[str]] = {}
        for region in traced.regions:
            infer_ranks(region.gm)
            for note in run_pipeline(fold_pipeline(), region.gm, progress).notes:
                went.setdefault(region.prefix + note.site, []).append(note.message)
    if is_converted(model):
        found = (dataclasses.replace(s, affine=", ".join(went.get(s.name, ()))) for s in sites(model))
        record(traced.root, tuple(found), notes(model))
        remember(traced.root, None)
    return traced.root.requires_grad_(False)
