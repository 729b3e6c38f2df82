"""The pass contract, and the runner of a pipeline."""

import abc
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, final

from torch import fx

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.base.errors import PassError, PnCompilerError
from pn_compiler.graph.aliases import find_aliases, has_effect

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass did to the graph that it was given, in place.

    Attributes:
        rewritten: how many places changed; 0 means that the graph is as it came.
        notes: one diagnostic for every refused or remarkable site.
    """

    rewritten: int = 0
    notes: tuple[Diagnostic, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """One pass of a finished pipeline run."""

    name: str
    rewritten: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class PipelineResult:
    notes: tuple[Diagnostic, ...]
    stages: tuple[Stage, ...]


class GraphPass(abc.ABC):
    """A rewrite of a traced graph, in place: match, refuse or rewrite, and say what was done."""

    runs_after: ClassVar[tuple[type["GraphPass"], ...]] = ()
    preserves_outputs: ClassVar[bool] = False

    def requires(self, graph: fx.GraphModule) -> None:  # noqa: B027  # optional by design
        """Raises PreconditionError if `graph` is not in the form that this pass needs."""

    @abc.abstractmethod
    def run(self, graph: fx.GraphModule) -> PassResult:
        """Rewrites `graph`."""

    def ensures(self, graph: fx.GraphModule) -> None:  # noqa: B027  # optional by design
        """Raises PostconditionError if the rewritten `graph` breaks this pass's promise."""

    @final
    def __call__(self, graph: fx.GraphModule) -> PassResult:
        self.requires(graph)
        result = self.run(graph)
        if result.rewritten:
            live = live_nodes(graph)
            graph.graph.eliminate_dead_code(lambda node: node in live)
            graph.graph.lint()
            graph.recompile()
        self.ensures(graph)
        return result


def live_nodes(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes of `graph` that its outputs depend on, or that do something else which can be noticed."""
    live: set[fx.Node] = set()
    pinned = find_aliases(graph).pinned
    for node in reversed(graph.graph.nodes):
        matters = node.is_impure() or _asserts(node) or has_effect(graph, node, pinned)
        if matters or not live.isdisjoint(node.users):
            live.add(node)
    return live


def _asserts(node: fx.Node) -> bool:
    """Whether `node` checks that an argument was left out."""
    return getattr(node.target, "__name__", "") == "_assert_is_none"


Progress = Callable[[str], None]


def run_pipeline(
    passes: Sequence[GraphPass], graph: fx.GraphModule, progress: Progress | None = None
) -> PipelineResult:
    """Runs `passes` in order on `graph`, in place.

    Raises:
        PassError: the order breaks a ``runs_after`` (before any work), or a pass fails.
    """
    check_order(passes)
    notes: list[Diagnostic] = []
    stages: list[Stage] = []
    for position, graph_pass in enumerate(passes, start=1):
        name = type(graph_pass).__name__
        if progress is not None:
            progress(name)
        start = time.perf_counter()
        try:
            result = graph_pass(graph)
        except PnCompilerError:
            raise
        except Exception as error:
            raise PassError(
                f"pass {position} of {len(passes)}, {name}: {type(error).__name__}: {error}"
            ) from error
        seconds = time.perf_counter() - start
        logger.debug("%s: %d rewritten, %.3f s", name, result.rewritten, seconds)
        notes.extend(result.notes)
        stages.append(Stage(name, result.rewritten, seconds))
    return PipelineResult(tuple(notes), tuple(stages))


def check_order(passes: Sequence[GraphPass]) -> None:
    """Raises PassError if a pass stands before one that it ``runs_after``."""
    seen: set[type[GraphPass]] = set()
    present = {type(graph_pass) for graph_pass in passes}
    for graph_pass in passes:
        for earlier in graph_pass.runs_after:
            if earlier in present and earlier not in seen:
                raise PassError(f"{type(graph_pass).__name__} must run after {earlier.__name__}")
        seen.add(type(graph_pass))
