"""Traces a module into a torch.fx graph, with as little as possible frozen into it.

A module that cannot be traced stays whole, and the trace is repeated without entering it.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from torch import fx, nn

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.base.errors import ConfigError, TraceError, first_line
from pn_compiler.graph.graph_module import ConvertedModule
from pn_compiler.inspection.batch_norms import holds_batch_norm, plain_base
from pn_compiler.inspection.containers import Containers
from pn_compiler.inspection.hooks import HookedModules
from pn_compiler.inspection.module_state import ModuleState
from pn_compiler.proxies.trace_failures import Failure
from pn_compiler.running.inputs import Inputs
from pn_compiler.tracing.tracer import Tracer
from pn_compiler.tracing.training_flag import branches_note, read_flags_in_graph


class NotTracedError(TraceError):
    """The forward of the module itself cannot be traced.

    Attributes:
        notes: diagnostics that say why, if torch.fx itself would not have noticed.
        reason: the reason in words.
    """

    def __init__(self, module: nn.Module, failure: Failure) -> None:
        super().__init__(f"torch.fx cannot trace {type(module).__name__}.forward: {failure.reason}")
        self.notes = tuple(failure.notes())
        self.reason = failure.reason


def trace_module(
    module: nn.Module,
    inputs: Inputs | None = None,
    leaves: frozenset[str] = frozenset(),
    *,
    outermost: bool = True,
    example: Callable[[], Inputs | None] = lambda: None,
    reasons: dict[str, str] | None = None,
    taps: Collection[str] = (),
) -> tuple[ConvertedModule, frozenset[str], tuple[Diagnostic, ...]]:
    """Traces `module`; the graph refers to its own submodules.

    A submodule whose forward cannot be traced stays whole, as a leaf.

    Args:
        module: the graph shares its parameters and submodules.
        inputs: arguments of a call; parameters of forward beyond them keep their defaults.
        leaves: paths of submodules that stay whole in any case.
        outermost: whether the user calls the module: arguments of unknown type are taken to be tensors.
        example: without `inputs`, returns arguments of a call if the forward asks how many dimensions a
            value has; they are used for nothing else.
        reasons: filled with why submodules stay whole, by path.
        taps: paths of submodules; if there are any, the graph returns a pair of their outputs by path, those
            of several calls as a tuple, and its own.

    Returns:
        The graph, the paths of the submodules that stay whole, and notes about fixed branches, values that
        are only stored, and why submodules stay whole.

    Raises:
        TraceError: the forward of `module` itself cannot be traced.
    """
    tracing = _Tracing(module, inputs, leaves, outermost, example, taps)
    graph = tracing.run()
    if reasons is not None:
        reasons.update(tracing.reasons)
    read_flags_in_graph(module, graph)
    vars(module).update(tracing.functions)  # where the graph looks up what it calls
    gm = ConvertedModule(module, graph, type(module).__name__)
    for path in tracing.functions:
        del vars(module)[path]
    gm.training = module.training
    gm.adopt_hooks(module)
    for name, child in gm.named_modules():
        if name:
            child.training = _training_of(module, name)
    return gm, tracing.leaves, tuple(sorted(tracing.notes, key=str))


_CHECKPOINTED = Diagnostic(
    "PN113",
    "",
    "the forward uses torch.utils.checkpoint; the converted one keeps all activations",
    "convert and checkpoint block by block, see docs/training.md",
)


def _stored_note(path: str, name: str) -> Diagnostic:
    return Diagnostic(
        "PN112",
        path,
        f"the forward stores self.{name}; that of the converted network does not",
        f"leaves=[{path!r}] keeps the module as it is" if path else "return the value instead",
    )


def _training_of(model: nn.Module, path: str) -> bool:
    try:
        return model.get_submodule(path).training
    except AttributeError:  # a container that only the graph has
        return model.training


class _Tracing:
    """Traces `model` repeatedly, each time making the innermost module that fails one more leaf."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs | None,
        leaves: frozenset[str],
        outermost: bool,
        example: Callable[[], Inputs | None],
        taps: Collection[str],
    ) -> None:
        self.model, self.inputs, self.outermost, self.example = model, inputs, outermost, example
        self.taps = taps
        self.notes: set[Diagnostic] = set()
        self.reasons: dict[str, str] = {}  # path of a leaf -> why it is one
        called_around = HookedModules.of(model)
        self.leaves = leaves | called_around.hooked
        for path in called_around.reading - leaves:
            self._keep(Failure(path, "PN118", "it shares state with a hook"))
        self._watch_state = False
        self.functions: dict[str, nn.Module] = {}  # those that the graph calls, by path

    def run(self) -> fx.Graph:
        """The graph, once the rest can be traced. Raises TraceError if it cannot."""
        while True:
            before = ModuleState(self.model)
            tracer = self._tracer()
            tracer.state = before if self._watch_state else None
            branches: set[str] = set()
            try:
                graph = self._record(tracer, before.containers, branches)
                changed, stored = before.changes()
                shared = bool(before.containers.changed()) or before.rewritten()
                if graph is None or not self._settle(tracer, graph, changed, shared):
                    continue
                if stored and self._reads_back(graph):
                    first, *others = sorted({path for path, _ in stored})
                    self._keep(Failure(first, "PN118", "it reads what an earlier call has stored"), others)
                    continue
            finally:
                before.restore()
                tracer.random.restore()
            for module in tracer.wrapping.values():
                module.__class__ = plain_base(module)  # the rest of its forward is in the graph
            self._take_notes(tracer, branches, stored)
            self.functions = {**tracer.functions.layers}
            if self.taps:
                _return_taps(graph, tracer)
            graph._tracer_cls = None  # unpickling traces the generated code, with the tracer of torch.fx
            return graph

    def _tracer(self) -> Tracer:
        tracer = Tracer(self.model, self.inputs, self.leaves, self.outermost, self.example)
        tracer.tapped = {path: [] for path in self.taps}
        return tracer

    def _record(self, tracer: Tracer, containers: Containers, branches: set[str]) -> fx.Graph | None:
        """Traces once; None if it failed and must be retried with one more leaf."""
        graph = None
        try:
            graph = tracer.trace_watched(branches, containers)
        except Exception as error:
            tracer.failed(getattr(error, "code", None), first_line(error))
        if tracer.failure is None:
            return graph
        self._keep(tracer.failure, tracer.also_whole)
        return None

    def _keep(self, failure: Failure, others: Iterable[str] = ()) -> None:
        """Makes the module at fault a leaf, and `others` as well, for the same reason.

        Raises:
            NotTracedError: one of them is the model itself, or all are leaves, so the fault is elsewhere.
        """
        paths = {failure.path, *others, *self._alike(failure)}
        if "" in paths or paths <= self.leaves:
            raise NotTracedError(self.model, dataclasses.replace(failure, path=""))
        for path in paths - self.leaves:
            if failure.code or holds_batch_norm(self.model.get_submodule(path)):
                self.notes |= dataclasses.replace(failure, path=path).notes()
            self.reasons[path] = failure.reason
        self.leaves |= paths

    def _alike(self, failure: Failure) -> Iterator[str]:
        """Other modules of the class at fault with nothing to convert in them; this saves traces."""
        kind = type(self.model.get_submodule(failure.path))
        if failure.code is None or not failure.path or kind.__module__.startswith("torch."):
            return
        for path, module in self.model.named_modules():
            if path and type(module) is kind and not holds_batch_norm(module):
                yield path

    def _settle(self, tracer: Tracer, graph: fx.Graph, changed: set[str], shared: bool) -> bool:
        """Whether the trace is final; if not, leaves were added, or the state is watched from now on."""
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
        other = tracer.wrapping.keys() - (called - read)  # never called, or more than just the norm
        self.leaves |= other
        for path in changed:
            reason = "the forward changes attributes of a module"
            self._keep(Failure(path, "PN118", reason), tracer.writes.writers.get(path, ()))
        if shared and not changed:
            if self._watch_state:  # the change happens where no module begins or ends
                self._keep(Failure("", "PN118", "the forward changes what modules share"))
            self._watch_state = True
        return not (other or changed or shared)

    def _reads_back(self, graph: fx.Graph) -> bool:
        """Whether a second trace, after what the first one stored, records something else."""
        tracer = self._tracer()
        try:
            again = tracer.trace_watched(set(), Containers())
        except Exception:  # it met a proxy of the first trace
            return True
        return tracer.failure is not None or str(again) != str(graph)

    def _take_notes(self, tracer: Tracer, branches: set[str], stored: set[tuple[str, str]]) -> None:
        self.notes |= {branches_note(path, self.model.training) for path in branches}
        self.notes |= {_stored_note(path, name) for path, name in stored}
        self.notes |= {_CHECKPOINTED} if tracer.checkpointed else set()
        self.notes |= {_assumed_note(path) for path in tracer.assumed}
        self.notes |= {_rank_note(path) for path in tracer.asked_rank}


def _return_taps(graph: fx.Graph, tracer: Tracer) -> None:
    """Raises TraceError if the forward does not reach a module whose output is asked for."""
    missed = sorted(path for path, values in tracer.tapped.items() if not values)
    if missed:
        raise TraceError(
            f"the traced forward does not call {', '.join(missed)}, or only inside untraced code"
        )
    found = {path: values[0] if len(values) == 1 else (*values,) for path, values in tracer.tapped.items()}
    output = graph.output_node()
    output.args = ((tracer.create_arg(found), output.args[0]),)


def _assumed_note(path: str) -> Diagnostic:
    return Diagnostic(
        "PN119",
        path,
        "the forward asks for the type of a value; the inputs of the model are taken to be tensors",
        "pass example_inputs if they are not",
    )


def _rank_note(path: str) -> Diagnostic:
    return Diagnostic(
        "PN124",
        path,
        "the forward asks how many dimensions or pieces a value has: as many as in the example from now on",
        f"leaves=[{path!r}] keeps the module as it is" if path else "convert with inputs of the kind in use",
    )


def _names_modules(leaf: object) -> bool:
    return isinstance(leaf, str) or (isinstance(leaf, type) and issubclass(leaf, nn.Module))


def resolve_leaves(model: nn.Module, leaves: Sequence[str | type[nn.Module]]) -> frozenset[str]:
    """Paths of the submodules of `model` that `leaves` names, by path or by class.

    Raises:
        ConfigError: an entry names nothing in `model`.
    """
    listed = [leaves] if isinstance(leaves, str | type) else () if leaves is None else leaves
    if not isinstance(listed, Collection) or not all(_names_modules(leaf) for leaf in listed):
        raise ConfigError(f"leaves={leaves!r:.80}: expected a list of paths and classes of modules")
    paths: set[str] = set()
    for leaf in listed:
        matches = {
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if (isinstance(module, leaf) if isinstance(leaf, type) else name == leaf)
        }
        if not matches:
            entry = leaf.__name__ if isinstance(leaf, type) else repr(leaf)
            raise ConfigError(f"leaves: the model has no module {entry}")
        paths |= matches
    return frozenset(paths)
