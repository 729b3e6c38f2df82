"""The passes and the pipelines that they form. Nothing registers itself: these lists are complete."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from pn_compiler.base.config import TransformConfig
from pn_compiler.base.errors import PassError
from pn_compiler.graph.pass_base import GraphPass, check_complete, flatten
from pn_compiler.graph.warm_start import Calibrated
from pn_compiler.passes.convert.insert_proxy_norm import InsertProxyNorm
from pn_compiler.passes.convert.replace_batch_norm import ReplaceBatchNorm
from pn_compiler.passes.convert.share_statistics import ShareStatistics
from pn_compiler.passes.fold.fold_proxy_norm import FoldProxyNorm
from pn_compiler.passes.fold.normalize_before_expansion import Expansion, NormalizeBeforeExpansion
from pn_compiler.passes.fold.sink_affine import SinkAffine
from pn_compiler.passes.fold.unshare_statistics import UnshareStatistics
from pn_compiler.passes.freeze.absorb_constants import AbsorbConstants
from pn_compiler.passes.freeze.freeze_normalizers import FreezeNormalizers
from pn_compiler.passes.freeze.split_clips import SplitClips
from pn_compiler.passes.freeze.split_gates import SplitGates
from pn_compiler.passes.prepare.canonicalize_activations import CanonicalizeActivations
from pn_compiler.passes.prepare.canonicalize_modules import CanonicalizeModules
from pn_compiler.passes.prepare.hoist_activations import HoistActivations
from pn_compiler.passes.prepare.recognize_activations import RecognizeActivations
from pn_compiler.passes.remove_dead_modules import RemoveDeadModules
from pn_compiler.passes.route_affine import RouteAffine


def preparation_pipeline() -> tuple[GraphPass, ...]:
    """The passes that every conversion begins with, in order: each BatchNorm becomes a plain module."""
    return (
        CanonicalizeModules(),  # functional and fused layers become modules: the rest only match modules
        CanonicalizeActivations(),  # likewise, and in-place effects become edges
        RecognizeActivations(),  # needs those modules; finds x * sigmoid(x) and the like
        HoistActivations(),  # last of the preparations: every activation now stands next to its BatchNorm
    )


def transform_pipeline(config: TransformConfig) -> tuple[GraphPass, ...]:
    """The passes of `pn_compiler.transform`, in order: BatchNorm in, proxy normalization out.

    Between the two parts the graph is compared with the model that it was traced from.
    """
    return (*preparation_pipeline(), *conversion_pipeline(config))


def conversion_pipeline(
    config: TransformConfig,
    calibrated: Mapping[str, Calibrated] | None = None,
    left_alone: frozenset[str] = frozenset(),
) -> tuple[GraphPass, ...]:
    """The passes that change what a prepared graph computes, in order."""
    return (
        ReplaceBatchNorm(
            config, calibrated, left_alone
        ),  # changes outputs on purpose; the warm start is computed here
        InsertProxyNorm(config),  # reads the new normalizers' affine; consumers undo it in a warm start
        *(
            (RouteAffine(through_padding=True),)  # the padding then comes before the shift
            if config.proxy_padding == "activation"
            else ()
        ),
        ShareStatistics(),  # sites are final now: nothing below looks at their inputs
        RemoveDeadModules(),  # last: drops what the rewrites orphaned
    )


PipelineEdit = Callable[[tuple[GraphPass, ...]], Iterable[GraphPass]]


def edited(
    edit: PipelineEdit | None, prepare: tuple[GraphPass, ...], convert: tuple[GraphPass, ...]
) -> tuple[tuple[GraphPass, ...], tuple[GraphPass, ...]]:
    """The two parts of a transform pipeline after a user's `edit`; the second begins at ReplaceBatchNorm.

    Raises:
        PassError: ReplaceBatchNorm is gone, or a pass stands behind none that it requires.
    """
    if edit is None:
        return prepare, convert
    passes = tuple(edit((*prepare, *convert)))
    strangers = [graph_pass for graph_pass in passes if not isinstance(graph_pass, GraphPass)]
    if strangers:
        raise PassError(f"pipeline returned {strangers[0]!r:.80}: expected instances of GraphPass")
    check_complete(passes)
    for position, graph_pass in enumerate(passes):
        if any(isinstance(part, ReplaceBatchNorm) for part in flatten((graph_pass,))):
            return passes[:position], passes[position:]
    raise PassError("pipeline left out ReplaceBatchNorm: nothing would be converted")


def fold_pipeline() -> tuple[GraphPass, ...]:
    """The passes of `pn_compiler.fold`, in order: proxy statistics become constants. Eval only."""
    return (
        UnshareStatistics(),  # a site is folded with its own constants
        RouteAffine(through_padding=False),  # sites still whole: as far as is exact
        SinkAffine(),  # the rest moves through branches, where every path ends in an absorber
        FoldProxyNorm(),  # constants, anchors included, go into weights, biases and bounds
        RemoveDeadModules(),  # last: drops what the rewrites orphaned
    )


def narrow_pipeline(
    shapes: Mapping[str, tuple[int, ...]],
    why_not: Callable[[Expansion], str | None] = lambda _: None,
    multiple: int = 16,
) -> tuple[GraphPass, ...]:
    """The passes of an export, on a copy of a folded graph; options as of `NormalizeBeforeExpansion`."""
    return (NormalizeBeforeExpansion(shapes, why_not, multiple),)


def freeze_pipeline(constants: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[GraphPass, ...]:
    """The passes of `pn_compiler.freeze_statistics`, in order, after those of `fold`. Eval only.

    `constants` holds scale and shift, [C], of each normalizer to freeze, by path.
    """
    return (
        FreezeNormalizers(constants),  # changes outputs on purpose
        SplitClips(),  # while the affine before a clip is still separate: it absorbs one of the two halves
        SplitGates(),  # likewise: frozen sites are still recognised by their affine
        AbsorbConstants(),  # those that remain become one operator each
        RemoveDeadModules(),  # last: drops what the rewrites orphaned
    )
