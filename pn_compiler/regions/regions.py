"""Reaches every BatchNorm: traces the parts of a model that torch.fx can trace if it cannot trace the whole.

A submodule whose forward cannot be traced stays whole, but the modules it calls are traced on their own. Each
such part is a region: a graph that replaces the module that it was traced from.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence

from torch import fx, nn

from pn_compiler.base.diagnostics import CODES, Diagnostic
from pn_compiler.base.errors import ConfigError, TraceError
from pn_compiler.graph.graph_module import ConvertedModule, detach, is_converted
from pn_compiler.graph.graph_utils import called_module, module_calls
from pn_compiler.graph.pass_base import live_nodes
from pn_compiler.inspection.batch_norms import closed_kind, holds_batch_norm, is_batch_norm
from pn_compiler.inspection.child_uses import children_looked_into, is_called_whole, read_norms
from pn_compiler.inspection.functional_norms import calls_batch_norm, reaches_batch_norm
from pn_compiler.inspection.functional_uses import calls_nothing_else, norms_called_as_functions
from pn_compiler.inspection.hooks import HookedModules, sharing_tensors
from pn_compiler.inspection.model_checks import refuse_global_hooks
from pn_compiler.inspection.weight_writes import may_write_weights
from pn_compiler.nn import answer_batch_norm, put_behind
from pn_compiler.proxies.trace_failures import whole_note
from pn_compiler.regions.observed_calls import ObservedCalls
from pn_compiler.running.copying import copy_model
from pn_compiler.running.inputs import Inputs
from pn_compiler.tracing.trace_module import NotTracedError, resolve_leaves, trace_module
from pn_compiler.tracing.training_flag import branches_note

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A traced part of a model.

    Attributes:
        prefix: prefix of its paths in the whole model; "" or "a.b.".
        gm: the trace.
        owner: for a BatchNorm that untraceable code calls on its own, the module that holds it; the graph
            then only exists during a conversion.
        functional: whether that code calls batch_norm with its tensors instead.
        source: the module that was traced; None if the model came as a graph.
    """

    prefix: str
    gm: ConvertedModule
    owner: nn.Module | None = None
    functional: bool = False
    source: nn.Module | None = None

    def finish(self) -> None:
        """Hands the replacement of a lone BatchNorm, with the parts split off it, to its owner."""
        if self.owner is None:
            return
        first, *rest = module_calls(self.gm)
        norm = self.gm.get_submodule(first)
        if is_batch_norm(norm):
            return  # refused: the owner still holds the original
        if rest:
            put_behind(norm, {path.removeprefix(f"{first}_"): self.gm.get_submodule(path) for path in rest})
        if self.functional:
            answer_batch_norm(norm, getattr(self.owner, first).momentum)
        setattr(self.owner, first, norm)


@dataclasses.dataclass(slots=True)
class Trace:
    """A copy of a model with its regions in place.

    Attributes:
        root: the copy; a graph if the forward of the model itself can be traced.
        regions: all graphs in it, the outermost first.
        opaque: paths of the modules that stayed whole, the outermost first; "" is the model itself.
        leaves: paths of modules that must not be traced.
        asked: those of them that the user named.
        notes: about branches that were fixed, and why modules stay whole.
        paths: id of each module and parameter -> every path that leads to it, or to its owner.
        entered: paths of the modules whose forward is part of a graph.
        norm_calls: those of them that call batch_norm as a function there, and modules that stay whole and
            call it only with the tensors of BatchNorms that are regions.
        unread_norm_calls: those of them whose results are never read.
        calls: arguments of the inner modules, in a call of the model on example inputs.
        reasons: path of a module that stayed whole -> why, as far as known.
    """

    root: nn.Module
    calls: ObservedCalls
    regions: list[Region] = dataclasses.field(default_factory=list)
    opaque: list[str] = dataclasses.field(default_factory=list)
    leaves: frozenset[str] = frozenset()
    asked: frozenset[str] = frozenset()
    notes: list[Diagnostic] = dataclasses.field(default_factory=list)
    paths: dict[int, list[str]] = dataclasses.field(default_factory=dict)
    entered: set[str] = dataclasses.field(default_factory=set)
    norm_calls: set[str] = dataclasses.field(default_factory=set)
    unread_norm_calls: set[str] = dataclasses.field(default_factory=set)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)


def trace(
    model: nn.Module,
    inputs: Inputs | None = None,
    leaves: Sequence[str | type[nn.Module]] = (),
    *,
    in_place: bool = False,
    example: Callable[[], Inputs | None] = lambda: None,
) -> Trace:
    """Traces a copy of `model`, in regions where it cannot be traced as a whole.

    Args:
        model: left untouched, unless `in_place`.
        inputs: arguments of a call; parameters of forward beyond them keep their defaults.
        leaves: paths or classes of modules that stay whole, as if they could not be traced.
        in_place: trace `model` itself, whose parts become those of the result.
        example: without `inputs`, returns arguments of a call if code asks how many dimensions a value has.

    Raises:
        ConfigError: the inputs do not fit the forward, `leaves` names nothing, or there are global hooks.
        TraceError: no part of a model without BatchNorm can be traced.
        UnsupportedModelError: a lazy module is not initialised yet, or the model cannot be copied.
    """
    refuse_global_hooks()
    _check_fit(model, inputs)
    calls = ObservedCalls(model, example if inputs is None else lambda: inputs)
    model = model if in_place else copy_model(model)
    asked = resolve_leaves(model, leaves)
    traced = Trace(model, calls, leaves=asked, asked=asked)
    for name, module in model.named_modules(remove_duplicate=False):
        for part in (module, *(p for p in module._parameters.values() if p is not None)):
            traced.paths.setdefault(id(part), []).append(name)
    if isinstance(model, fx.GraphModule) and not _calls_whole(model):
        traced.notes += _other_graph_note(model)
        traced.norm_calls.add("")
        traced.root = whole = ConvertedModule(model, model.graph).adopt_hooks(model)
        parts = [(name, detach(graph)) for name, graph in named_graphs(model) if name]
        traced.regions = [Region("", whole), *(Region(f"{n}.", graph) for n, graph in parts)]
    elif is_converted(model):  # an earlier result whose own forward could not be traced
        traced.regions = [Region(f"{name}.", detach(graph)) for name, graph in named_graphs(model)]
    else:
        try:
            traced.root = _trace_into(model, "", inputs, traced)
        except TraceError as error:
            if not holds_batch_norm(model):
                raise
            traced.leaves |= sharing_tensors(model)
            _trace_children(model, "", traced, apart=_note_failure(error, "", traced))
    return traced


def _calls_whole(gm: fx.GraphModule) -> bool:
    """Whether a foreign graph calls a module that contains BatchNorms, so that it must be traced into."""
    called = (gm.get_submodule(path) for path in module_calls(gm))
    return any(
        holds_batch_norm(module)
        for module in called
        if not (is_batch_norm(module) or closed_kind(module) or isinstance(module, ConvertedModule))
    )


def _other_graph_note(gm: fx.GraphModule) -> list[Diagnostic]:
    """A note if the graphs for the two modes differ, as they may in torchvision's feature extractors."""
    other = getattr(gm, "eval_graph" if gm.training else "train_graph", gm.graph)
    return [] if str(other) == str(gm.graph) else [branches_note("", gm.training)]


def _check_fit(model: nn.Module, inputs: Inputs | None) -> None:
    if inputs is not None:
        try:
            inputs.by_name(model)
        except TypeError as error:
            raise ConfigError(f"the inputs do not fit {type(model).__name__}.forward: {error}") from error


def named_graphs(model: nn.Module) -> Iterator[tuple[str, ConvertedModule]]:
    """Path and graph of each of `converted_graphs`."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, ConvertedModule))


def converted_graphs(model: nn.Module) -> list[ConvertedModule]:
    """The graphs of a converted model: itself if it is a graph, and those in modules that stayed whole."""
    return [graph for _, graph in named_graphs(model)]


def _trace_into(module: nn.Module, path: str, inputs: Inputs | None, traced: Trace) -> ConvertedModule:
    """The graph of `module`, with regions inside modules that stay whole. Raises TraceError."""
    if path in traced.leaves:
        raise TraceError(f"{path or type(module).__name__} is to stay whole")
    prefix = f"{path}." if path else ""
    inside = frozenset(leaf.removeprefix(prefix) for leaf in traced.leaves if leaf.startswith(prefix))
    hooked = HookedModules.of(module).hooked - inside
    example = functools.partial(traced.calls.of, path)
    reasons: dict[str, str] = {}
    gm, leaves, notes = trace_module(
        module, inputs, inside, outermost=not path, example=example, reasons=reasons
    )
    traced.reasons.update((prefix + leaf, reason) for leaf, reason in reasons.items())
    traced.regions.append(Region(prefix, gm, source=module))
    _note_entered(gm, path, traced)
    _take_notes(notes, path, traced)
    outer = {leaf for leaf in leaves if not _is_inside(leaf, leaves)}
    traced.leaves |= {prefix + leaf for leaf in leaves - outer}
    traced.leaves |= sharing_tensors(traced.root) if outer else frozenset()
    for leaf in sorted(outer):
        logger.info("%s stays whole", prefix + leaf)
        inner, why = gm.get_submodule(leaf), {note.code for note in notes if note.site == leaf}
        alone = leaf in hooked and not why and not _is_shared(inner, prefix + leaf, traced)
        if alone and holds_batch_norm(inner) and not closed_kind(inner):
            gm.set_submodule(leaf, _trace_or_enter(inner, prefix + leaf, traced, apart=False))
        else:
            _trace_children(inner, prefix + leaf, traced, apart="PN115" in why)
    return gm


def _note_entered(gm: ConvertedModule, path: str, traced: Trace) -> None:
    """Records which modules became part of `gm`, the trace of the module at `path`."""
    traced.entered.add(path)
    read = live_nodes(gm)
    for node in gm.graph.nodes:
        inner = _entered_for(node, path)
        if node.op == "call_module":
            inner = inner[:-1]  # the last one is called whole
        traced.entered.update(inner)
        if node.op == "call_function" and reaches_batch_norm(node.target):
            calls = traced.norm_calls if node in read else traced.unread_norm_calls
            calls.add(inner[-1] if inner else path)


def _entered_for(node: fx.Node, path: str) -> list[str]:
    """Paths of the modules inside the one at `path`, outermost first, that were running at `node`."""
    return [f"{path}.{name}" if path else name for name in node.meta.get("nn_module_stack", ()) if name]


def drop_dead_norm_calls(traced: Trace) -> None:
    """Removes from `traced.norm_calls` those whose results are unread once in-place writes are edges.

    Before, a write over a result counted as a reader. The graphs are prepared, so each call of batch_norm is
    a node of its own or a call of the BatchNorm that replaced it.
    """
    left = set()
    for region in traced.regions:
        path = region.prefix.removesuffix(".")
        for node in region.gm.graph.nodes:
            module = called_module(region.gm, node)
            if is_batch_norm(module) if module else reaches_batch_norm(node.target):
                left.add((_entered_for(node, path) or [path])[-1])
    dead = (traced.norm_calls - left) & traced.entered  # unknown for a model that already was a graph
    traced.unread_norm_calls |= dead
    traced.norm_calls -= dead


def _is_inside(path: str, others: frozenset[str]) -> bool:
    """Whether one of the modules at `others` contains the one at `path`."""
    return any(path.startswith(f"{other}.") for other in others)


def _trace_or_enter(module: nn.Module, path: str, traced: Trace, *, apart: bool) -> nn.Module:
    """The graph of `module`, or `module` itself with regions inside if it cannot be traced."""
    try:
        return _trace_into(module, path, None, traced)
    except TraceError as error:
        _trace_children(module, path, traced, apart=apart or _note_failure(error, path, traced))
        return module


def _note_failure(error: TraceError, path: str, traced: Trace) -> bool:
    """Reports why the module at `path` stays whole. Returns whether its forward rewrites weights."""
    notes = getattr(error, "notes", ())
    if isinstance(error, NotTracedError):
        traced.reasons[path] = error.reason
    _take_notes(notes, path, traced)
    return any(note.code == "PN115" for note in notes)


def _take_notes(notes: Sequence[Diagnostic], path: str, traced: Trace) -> None:
    for note in notes:
        site = ".".join(part for part in (path, note.site) if part)
        traced.notes.append(dataclasses.replace(note, site=site))


def _note_whole(module: nn.Module, path: str, traced: Trace) -> None:
    """Reports that `module` stays whole, if it holds a BatchNorm and no other note says so."""
    said = any(note.site == path and CODES[note.code][1].startswith("kept whole") for note in traced.notes)
    if said or is_batch_norm(module) or closed_kind(module) or not holds_batch_norm(module):
        return
    reason = "the code that calls it looks into it, shares it, or may rewrite its weights"
    traced.notes.append(whole_note("PN128", path, "leaves names it" if path in traced.asked else reason))


def _trace_children(owner: nn.Module, path: str, traced: Trace, *, apart: bool = False) -> None:
    """Replaces the modules that `owner`, which stays whole, calls by regions.

    With `apart`, each BatchNorm becomes a region of its own: nothing may be absorbed into weights that the
    code of `owner` rewrites.
    """
    apart = apart or may_write_weights(owner)
    traced.opaque.append(path)
    _note_whole(owner, path, traced)
    looked_into = children_looked_into(type(owner))  # type: ignore[arg-type]  # classes are hashable
    if looked_into is None:
        return  # its code may look inside any BatchNorm: they are reported as not reached
    functional = norms_called_as_functions(owner)
    if functional and calls_nothing_else(
        owner
    ):  # the BatchNorms among them that are shared have records of their own
        traced.norm_calls.add(path)
    for name, child in list(owner.named_children()):
        inside = f"{path}.{name}" if path else name
        if name in looked_into - functional or closed_kind(child) or not holds_batch_norm(child):
            continue
        shared = _is_shared(child, inside, traced)
        if is_batch_norm(child):
            if not shared and name not in read_norms(type(owner)) - functional:  # type: ignore[arg-type]  # hashable
                traced.regions.append(_lone_region(owner, name, path, functional=name in functional))
        elif (apart and not _only_normalizes(child)) or shared or not is_called_whole(owner, name, child):
            _trace_children(child, inside, traced, apart=apart)  # no region may change a shared weight
        else:
            setattr(owner, name, _trace_or_enter(child, inside, traced, apart=False))


def _only_normalizes(module: nn.Module) -> bool:
    """Whether `module` calls batch_norm, and has no weights that could absorb anything."""
    vectors = all(tensor.dim() <= 1 for tensor in (*module.parameters(), *module.buffers()))
    return vectors and calls_batch_norm(module)


def _is_shared(child: nn.Module, path: str, traced: Trace) -> bool:
    """Whether something outside `path` also holds a part of `child`, or a graph around it reads its tensors.

    Modules without parameters, such as activations, can be part of several graphs.
    """
    read = _read_by_graphs(traced)
    return any(id(module) in read for module in child.modules()) or any(
        other != path and not other.startswith(f"{path}.")
        for module in child.modules()
        if is_batch_norm(module) or module._parameters or module._buffers
        for part in (module, *module._parameters.values())
        for other in traced.paths.get(id(part), ())
    )


def _read_by_graphs(traced: Trace) -> set[int]:
    """Ids of the modules of which a graph reads parameters or buffers itself."""
    return {
        id(region.gm.get_submodule(str(node.target).rpartition(".")[0]))
        for region in traced.regions
        for node in region.gm.graph.find_nodes(op="get_attr")
        if node.users
    }


def _lone_region(owner: nn.Module, name: str, path: str, *, functional: bool) -> Region:
    """A BatchNorm that untraceable code calls: a graph over `owner` that calls nothing else."""
    graph = fx.Graph()
    graph.output(graph.call_module(name, (graph.placeholder("x"),)))
    gm = ConvertedModule(owner, graph)
    return Region(f"{path}." if path else "", gm, owner, functional)
