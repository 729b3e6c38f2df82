"""The pass contract, and the runner of a pipeline."""

import abc
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, final

from torch import fx

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.base.errors import PassError, PnCompilerError
from pn_compiler.graph.aliases import find_aliases, has_effect
from pn_compiler.graph.graph_module import ConvertedModule, freeze_graph
from pn_compiler.graph.pass_log import log_pass

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass did to its graph, in place.

    Attributes:
        rewritten: how many places changed; 0 means that the graph is unchanged.
        notes: one diagnostic for every refused or otherwise notable site.
    """

    rewritten: int = 0
    notes: tuple[Diagnostic, ...] = ()


class GraphPass(abc.ABC):
    """An in-place rewrite of a traced graph: matches sites, refuses or rewrites them, and reports."""

    runs_after: ClassVar[tuple[type["GraphPass"], ...]] = ()  # as far as they are in the pipeline
    requires: ClassVar[tuple[type["GraphPass"], ...]] = ()  # must be in the pipeline, before this pass
    preserves_outputs: ClassVar[bool] = False

    @abc.abstractmethod
    def run(self, gm: fx.GraphModule) -> PassResult:
        """Rewrites `gm`."""

    def ensures(self, gm: fx.GraphModule) -> None:  # noqa: B027  # optional by design
        """Raises PostconditionError if the rewritten `gm` breaks this pass's promise."""

    @final
    def __call__(self, gm: fx.GraphModule) -> PassResult:
        if isinstance(gm, ConvertedModule):
            freeze_graph(gm)
        result = self.run(gm)
        if result.rewritten:
            live = live_nodes(gm)
            gm.graph.eliminate_dead_code(lambda node: node in live)
            gm.graph.lint()
            gm.recompile()
        self.ensures(gm)
        return result


def live_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes of `gm` that its outputs depend on, or that have another observable effect."""
    live: set[fx.Node] = set()
    pinned = find_aliases(gm).pinned
    for node in reversed(gm.graph.nodes):
        matters = node.is_impure() or _asserts(node) or has_effect(gm, node, pinned)
        if matters or not live.isdisjoint(node.users):
            live.add(node)
    return live


def _asserts(node: fx.Node) -> bool:
    """Whether `node` asserts that an argument was omitted."""
    return getattr(node.target, "__name__", "") == "_assert_is_none"


Progress = Callable[[str], None]


class PassGroup(GraphPass):
    """Several passes, in order, as a single pass."""

    def __init__(self, *passes: GraphPass) -> None:
        self.passes = passes

    def run(self, gm: fx.GraphModule) -> PassResult:
        return run_pipeline(self.passes, gm)


def run_pipeline(
    passes: Sequence[GraphPass], gm: fx.GraphModule, progress: Progress | None = None
) -> PassResult:
    """Runs `passes` in order on `gm`, in place, and returns their combined result.

    Raises:
        PassError: the order breaks a ``runs_after`` (before any work), or a pass fails.
    """
    check_order(passes)
    results: list[PassResult] = []
    for position, graph_pass in enumerate(passes, start=1):
        name = type(graph_pass).__name__
        if progress is not None:
            progress(name)
        start = time.perf_counter()
        try:
            result = graph_pass(gm)
        except PnCompilerError:
            raise
        except Exception as error:
            done = ", ".join(type(earlier).__name__ for earlier in passes[: position - 1])
            behind = f" (behind {done})" if done else ""
            raise PassError(
                f"pass {position} of {len(passes)}, {name}{behind}: {type(error).__name__}: {error}"
            ) from error
        seconds = time.perf_counter() - start
        logger.debug("%s: %d rewritten, %.3f s", name, result.rewritten, seconds)
        if not isinstance(graph_pass, PassGroup):  # its passes have been logged
            log_pass(name, about(graph_pass), result.rewritten, seconds)
        results.append(result)
    notes = tuple(note for result in results for note in result.notes)
    return PassResult(sum(result.rewritten for result in results), notes)


def about(graph_pass: GraphPass) -> str:
    """The first line of what the class of `graph_pass` says of itself."""
    return next(iter((type(graph_pass).__doc__ or "").strip().splitlines()), "")


def flatten(passes: Iterable[GraphPass]) -> Iterator[GraphPass]:
    """Each pass of `passes` and of the groups among them, in order."""
    for graph_pass in passes:
        if isinstance(graph_pass, PassGroup):
            yield from flatten(graph_pass.passes)
        else:
            yield graph_pass


def check_order(passes: Iterable[GraphPass]) -> None:
    """Raises PassError if a pass comes before one that it ``runs_after`` or ``requires``."""
    kinds = [type(graph_pass) for graph_pass in flatten(passes)]
    for position, kind in enumerate(kinds):
        for earlier in (*kind.runs_after, *kind.requires):
            if earlier in kinds[position:] and earlier not in kinds[:position]:
                raise PassError(f"{kind.__name__} must run after {earlier.__name__}")


def check_complete(passes: Iterable[GraphPass]) -> None:
    """Raises PassError if the whole pipeline `passes` lacks, before some pass, one that it ``requires``."""
    seen: set[type[GraphPass]] = set()
    for graph_pass in flatten(passes):
        for needed in graph_pass.requires:
            if needed not in seen:
                raise PassError(f"{type(graph_pass).__name__} requires {needed.__name__} before it")
        seen.add(type(graph_pass))
