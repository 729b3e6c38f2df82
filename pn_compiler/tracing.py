"""From a module to a torch.fx graph, with as little of the model as possible frozen in."""

import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from pn_compiler.batch_norms import (
    closed_kind,
    holds_batch_norm,
    is_batch_norm,
    plain_base,
    wraps_batch_norm,
)
from pn_compiler.captured import attributes, reachable
from pn_compiler.diagnostics import Diagnostic
from pn_compiler.errors import ConfigError, TraceError, UnsupportedModelError, first_line
from pn_compiler.execution_modes import ExecutionModes
from pn_compiler.graph_module import ConvertedModule
from pn_compiler.hooked import HookedModules
from pn_compiler.inputs import Inputs
from pn_compiler.known_types import (
    SAMPLE,
    UNKNOWN,
    is_python_value,
    may_return_none,
    sample_inputs,
    sample_of,
)
from pn_compiler.module_state import Containers, ModuleState, hidden, inside_checkpoint
from pn_compiler.nn import ProxyNormAct, ReadTraining
from pn_compiler.proxies import PROXIES, TracedProxy, Untraceable, is_parameter, module_proxy
from pn_compiler.spelling import overwritten_by, source_of
from pn_compiler.trace_watch import PythonWatch, RandomStates, TensorWatch
from pn_compiler.training_flag import branches_note, read_flags_in_graph, training_flags

_LAYERS = (ProxyNormAct.__module__, ReadTraining.__module__)  # all that are there


class _Tracer(fx.Tracer):
    """Enters what may hold a site and its neighbours; leaves whole what needs no entering."""

    def __init__(
        self, model: nn.Module, inputs: Inputs | None, leaves: frozenset[str], outermost: bool
    ) -> None:
        super().__init__(param_shapes_constant=True)
        self.model = model
        self.inputs = inputs
        self.leaves = leaves
        self.wrapping = {
            path: module
            for path, module in model.named_modules()
            if path and path not in leaves and wraps_batch_norm(module)
        }
        self.stack = [""]  # paths of the modules being traced, outermost first
        self.failure: Failure | None = None  # the first, also where the forward catches the exception
        self.checkpointed = False
        self.assumed: set[str] = set()  # paths of modules that asked for the type of an unknown input
        self.modes = ExecutionModes()
        self.modes_at_entry = [self.modes.now()]
        self.random = RandomStates()
        self.state: ModuleState | None = None  # looked at wherever a module begins or ends, if given
        self.also_whole: set[str] = set()
        self.writers: dict[str, set[str]] = {}  # path of a module -> those whose forwards set its attributes
        self._samples: dict[fx.Node, Any] = {}
        self._assumed_input = SAMPLE if outermost else UNKNOWN

    def refuse(self, code: str | None, reason: str) -> NoReturn:
        """The module that is being traced does what a graph would not do."""
        self.failed(code, reason)
        raise Untraceable(code, reason)

    def failed(self, code: str | None, reason: str) -> None:
        failure = Failure(self.stack[-1], code, reason)
        if self.failure is None or (self.failure.path == failure.path and code == "PN115"):
            self.failure = failure  # what rewrites weights must be known as such

    def trace_watched(self, branches: set[str], containers: Containers) -> fx.Graph:
        """The graph of the model. `branches` gets the paths of modules that branch on self.training."""

        def entered(names: dict[str, Any]) -> None:
            containers.add_globals(names)
            for value in names.values():
                self.random.note(value)

        model = self.model
        for module in model.modules():
            for value in reachable(attributes(module)):
                self.random.note(value)
        with (
            _recorded_super_calls(self),
            training_flags(model, self, branches),
            hidden(model, self.leaves),
            self.modes.watched(),
            _watched_attributes(self),
            TensorWatch(self.refuse),
            PythonWatch(self.refuse, entered),
        ):
            self.modes_at_entry = [self.modes.now()]
            graph = self.trace(model)
            self._check_quiet()
        return graph

    def _check_quiet(self) -> None:
        """Nothing was drawn, and nothing that modules share was changed, since the last look."""
        if (moved := self.random.moved()) is not None:
            self.refuse("PN117", moved)
        if self.state is None:
            return
        if self.state.rewritten():
            self.refuse("PN115", "the forward rewrites parameters")
        if owners := self.state.containers.changed():
            self.also_whole |= owners
            self.refuse("PN118", "the forward changes a list, dict or variable that outlives the call")

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """A forward sets an attribute of a module."""
        if name in module._parameters or isinstance(value, nn.Parameter):
            self.refuse("PN115", f"the forward replaces the parameter {name!r}")
        if name == "training":
            self.refuse("PN118", "the forward switches between train and eval mode")
        path = (self.submodule_paths or {}).get(module)
        if path is not None:
            self.writers.setdefault(path, set()).add(self.stack[-1])

    def _check_modes(self) -> None:
        now, before = self.modes.now(), self.modes_at_entry[-1]
        if now != before and (now[1] != before[1] or not inside_checkpoint()):
            self.failed("PN116", "the forward computes under a mode of its own (no_grad, autocast, ...)")

    def known(self, node: fx.Node) -> Any:
        """A value of the type that `node` has in a call, or UNKNOWN."""
        return sample_of(node, self.root, self._samples)

    def type_was_asked(self, proxy: fx.Proxy) -> None:
        if self.inputs is None and proxy.known() is not UNKNOWN:
            self.assumed.add(self.stack[-1])

    def write_of(self, node: fx.Node, what: str) -> tuple[str | None, str]:
        """Code and reason of a refusal to let the forward write to what `node` stands for."""
        path = source_of(node)
        if path is None:
            return None, f"the forward {what} a value"
        return "PN115", f"the forward {what} {path}"

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) in PROXIES else super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TracedProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.failed(None, f"the forward branches on {obj!r}")
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        self.failed(None, f"the forward iterates over {obj!r}")
        return super().iter(obj)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.checkpointed = self.checkpointed or inside_checkpoint()
        node = super().create_node(*args, **kwargs)
        if node.op in ("placeholder", "get_attr"):
            return node
        for target in overwritten_by(node):
            path = source_of(target)
            if path is not None and is_parameter(self.root, path):
                self.refuse("PN115", f"the forward rewrites {path}")
        if not is_python_value(self.known(node)):
            self._check_modes()
        return node

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return (
            path in self.leaves
            or closed_kind(module) is not None
            or (is_batch_norm(module) and not hasattr(type(module), _RECORDS))
            or type(module).__module__ in _LAYERS
            or super().is_leaf_module(module, path)
            or (not holds_batch_norm(module) and _reads_training(module))
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Buffers are read by the graph, as parameters are: what is computed of one must follow it."""
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        of_root = (
            self.root.named_parameters if isinstance(attr_val, nn.Parameter) else self.root.named_buffers
        )
        name = next((name for name, tensor in of_root() if tensor is attr_val), None)
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = module_proxy(self, name, attr_val)
        return parameter_proxy_cache[name]

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for what varies from call to call; the other arguments are fixed.

        With example inputs, numbers and what holds a tensor vary. Without, the first parameter does, and
        those that have no default.
        """
        forward = self.root.forward
        given = None if self.inputs is None else self.inputs.by_name(self.root)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in inspect.signature(forward).parameters.values():
            name = parameter.name
            if parameter.kind is parameter.VAR_KEYWORD:
                extra = given.get(name, {}) if given else {}
                kwargs.update((key, self._placeholder(key, value)) for key, value in extra.items())
            elif parameter.kind is parameter.VAR_POSITIONAL:
                if given is None:
                    raise TypeError(f"how many arguments *{name} takes is unknown: pass example_inputs")
                extra = given.get(name, ())
                args += [self._placeholder(f"{name}_{i}", value) for i, value in enumerate(extra)]
            elif given is None:
                first = not (args or kwargs)
                varies = first or parameter.default is parameter.empty
                value = _VARIES if varies else parameter.default
                kwargs[name] = self._placeholder(name, value, parameter.default)
            else:
                value = given.get(name, parameter.default)
                kwargs[name] = self._placeholder(name, value, parameter.default)
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                args.append(kwargs.pop(name))
        return functools.partial(forward, *args, **kwargs), []

    def _placeholder(self, name: str, value: Any, default: Any = inspect.Parameter.empty) -> Any:
        """A proxy for an argument that varies, else `value` itself, which every call must then give."""
        try:
            probe = pytree.tree_map_only(torch.Tensor, lambda _: None, value)  # no constant
            self.create_arg((probe, default) if default is not inspect.Parameter.empty else probe)
        except NotImplementedError:  # nothing that a graph can hold: no argument of the traced forward
            return value
        defaults = () if default is inspect.Parameter.empty else (default,)
        proxy = self.create_proxy("placeholder", name, defaults, {})
        if value is _VARIES or _varies(value):
            self._samples[proxy.node] = self._assumed_input if value is _VARIES else sample_inputs(value)
            return proxy
        check_fixed(proxy, value, name)
        return value

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self._check_modes()
        self._check_quiet()
        self.stack.append(self.path_of_module(m))
        self.modes_at_entry.append(self.modes.now())
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.failed(getattr(error, "code", None), first_line(error))
            raise
        returns_none = may_return_none(type(m))  # type: ignore[arg-type]  # classes are hashable
        if returns_none and self.is_leaf_module(m, self.stack[-1]):
            self.stack.pop()
            self.refuse("PN114", f"{type(m).__name__}, which the forward calls, may return None or not")
        self._check_quiet()
        if self.modes.now() != self.modes_at_entry[-1]:
            self.refuse("PN116", "the forward leaves a mode of torch changed")
        self.stack.pop()  # not in a finally: after a failure the stack says where
        self.modes_at_entry.pop()
        return result


_RECORDS = "_pn_compiler_records"


@contextlib.contextmanager
def _recorded_super_calls(tracer: _Tracer) -> Iterator[None]:
    """A subclass of BatchNorm that calls ``super().forward`` is traced, with that call as the BatchNorm.

    Each such module gets, for the time of the trace, a class in which ``super().forward`` records a call of
    the module itself.
    """
    changed = {}
    for path, module in tracer.wrapping.items():
        cls, base = type(module), plain_base(module)

        def record(self: nn.Module, x: Any, path: str = path) -> Any:
            return tracer.create_proxy("call_module", path, (x,), {})

        recorder = type(base.__name__, (base,), {"forward": record})
        changed[module] = cls
        module.__class__ = type(cls.__name__, (cls, recorder), {_RECORDS: True})
    try:
        yield
    finally:
        for module, cls in changed.items():
            module.__class__ = cls


@contextlib.contextmanager
def _watched_attributes(tracer: _Tracer) -> Iterator[None]:
    """Tells `tracer` of each attribute of a module that is set, but for those that torch.fx sets itself."""
    original = nn.Module.__setattr__

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if not str(sys._getframe(1).f_globals.get("__name__")).startswith("torch.fx."):
            tracer.set_attribute(module, name, value)
        original(module, name, value)

    nn.Module.__setattr__ = set_attribute  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]


_VARIES = "<varies>"


def _varies(value: Any) -> bool:
    """Whether an argument like `value` may take other values in other calls: a number, or with tensors."""
    return any(
        isinstance(leaf, torch.Tensor | int | float) and not isinstance(leaf, bool)
        for leaf in pytree.tree_leaves(value)
    )


@fx.node.has_side_effect
def check_fixed(value: Any, expected: Any, name: str) -> None:
    """Raises TypeError if an argument that tracing has fixed comes with another value."""
    if isinstance(value, fx.Proxy):
        value.tracer.create_proxy("call_function", check_fixed, (value, expected, name), {})
    elif value is not expected and not (type(value) is type(expected) and value == expected):
        told = f"of type {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
        raise TypeError(
            f"argument {name} is {told}, but the model was converted with {name}={expected!r}; for another "
            "value, give transform example_inputs or example_kwargs that have it"
        )


def _reads_training(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """Why a module is not traced.

    Attributes:
        path: of the innermost module whose code is the reason.
        code: of the diagnostic that reports it; None for what torch.fx itself cannot trace.
        reason: in words.
    """

    path: str
    code: str | None
    reason: str

    def notes(self) -> set[Diagnostic]:
        if self.code is None:
            return set()
        return {Diagnostic(self.code, self.path, f"the module stays whole: {self.reason}", _KEPT_HINT)}


_KEPT_HINT = "what it calls is converted on its own"


class NotTracedError(TraceError):
    """The forward of the module itself cannot be traced.

    Attributes:
        notes: diagnostics that say why, if it is for a reason that torch.fx would not have seen.
    """

    def __init__(self, module: nn.Module, failure: Failure) -> None:
        super().__init__(f"torch.fx cannot trace {type(module).__name__}.forward: {failure.reason}")
        self.notes = tuple(failure.notes())


@dataclasses.dataclass(frozen=True, slots=True)
class Traced:
    """What `trace_module` finds.

    Attributes:
        graph: of the module.
        leaves: paths of the submodules that stay whole.
        apart: paths of those leaves whose own forward can be traced: hooks have to be called around them.
        notes: on branches that are fixed, values that are only stored, and why submodules stay whole.
    """

    graph: ConvertedModule
    leaves: frozenset[str]
    apart: frozenset[str]
    notes: tuple[Diagnostic, ...]


def trace_module(
    module: nn.Module, inputs: Inputs | None = None, leaves: frozenset[str] = frozenset(), *, outermost: bool
) -> Traced:
    """Traces `module`, over its own submodules.

    A submodule whose forward cannot be traced stays whole, as a leaf.

    Args:
        module: the graph shares its parameters and submodules.
        inputs: arguments of a call; parameters of forward beyond them keep their defaults.
        leaves: paths of submodules that stay whole in any case.
        outermost: whether the user calls the module: arguments of unknown type are taken to be tensors.

    Raises:
        TraceError: the forward of `module` itself cannot be traced.
    """
    tracing = _Tracing(module, inputs, leaves, outermost)
    graph = tracing.run()
    read_flags_in_graph(module, graph)
    gm = ConvertedModule(module, graph, type(module).__name__)
    gm.training = module.training
    gm.adopt_hooks(module)
    for name, child in gm.named_modules():
        if name:
            child.training = _training_of(module, name)
    apart = frozenset(tracing.hooked & tracing.leaves)
    return Traced(gm, tracing.leaves, apart, tuple(sorted(tracing.notes, key=str)))


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


def refuse_uninitialised(model: nn.Module) -> None:
    """Raises UnsupportedModelError if a lazy module of `model` has not seen data yet."""
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            raise UnsupportedModelError(
                f"{name or 'the model'} is an uninitialised {type(module).__name__}: "
                "run the model once on real data before converting it"
            )


class _Tracing:
    """Traces `model`, again and again, with the innermost module that fails as one more leaf."""

    def __init__(
        self, model: nn.Module, inputs: Inputs | None, leaves: frozenset[str], outermost: bool
    ) -> None:
        self.model, self.inputs, self.outermost = model, inputs, outermost
        self.notes: set[Diagnostic] = set()
        called_around = HookedModules.of(model)
        self.hooked = called_around.hooked - leaves
        self.leaves = leaves | self.hooked
        for path in called_around.reading - leaves:
            self._keep(Failure(path, "PN118", "it shares state with a hook"))
        self._watch_state = False

    def run(self) -> fx.Graph:
        """The graph, when the rest can be traced. Raises TraceError if it cannot."""
        while True:
            before = ModuleState(self.model)
            tracer = _Tracer(self.model, self.inputs, self.leaves, self.outermost)
            tracer.state = before if self._watch_state else None
            branches: set[str] = set()
            try:
                graph = self._record(tracer, before.containers, branches)
                changed, stored = before.changes()
                shared = bool(before.containers.changed()) or before.rewritten()
                if graph is None or not self._settle(tracer, graph, changed, shared):
                    continue
                if stored and self._reads_back(graph):
                    for path, _ in stored:
                        self._keep(Failure(path, "PN118", "it reads what an earlier call has stored"))
                    continue
            finally:
                before.restore()
                tracer.random.restore()
            for module in tracer.wrapping.values():
                module.__class__ = plain_base(module)  # what else it does is in the graph
            self._take_notes(tracer, branches, stored)
            graph._tracer_cls = None  # unpickling traces the generated code, with the tracer of torch.fx
            return graph

    def _record(self, tracer: _Tracer, containers: Containers, branches: set[str]) -> fx.Graph | None:
        """One trace; None if it failed and is to be tried with one more leaf."""
        graph = None
        try:
            graph = tracer.trace_watched(branches, containers)
        except Exception as error:
            tracer.failed(getattr(error, "code", None), first_line(error))
        if tracer.failure is None:
            return graph
        self._keep(tracer.failure)
        for path in tracer.also_whole:
            self._keep(dataclasses.replace(tracer.failure, path=path))
        return None

    def _keep(self, failure: Failure) -> None:
        """From now on the module at fault is a leaf. Raises TraceError if that leaves nothing to trace."""
        path = failure.path
        if path == "":
            raise NotTracedError(self.model, failure)
        self.leaves |= {path}
        self.hooked -= {path}
        self.notes |= failure.notes()

    def _settle(self, tracer: _Tracer, graph: fx.Graph, changed: set[str], shared: bool) -> bool:
        """Whether the trace can stay as it is; if not, there are more leaves, or the state is watched."""
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
        other = tracer.wrapping.keys() - (called - read)  # never called, or with more to it than the norm
        self.leaves |= other
        for path in changed:
            for culprit in {path, *tracer.writers.get(path, ())}:
                self._keep(Failure(culprit, "PN118", "the forward changes attributes of a module"))
        if shared and not changed:
            if self._watch_state:  # it changes where no module begins or ends
                self._keep(Failure("", "PN118", "the forward changes what modules share"))
            self._watch_state = True
        return not (other or changed or shared)

    def _reads_back(self, graph: fx.Graph) -> bool:
        """Whether a second call, after what the first has stored, records something else."""
        tracer = _Tracer(self.model, self.inputs, self.leaves, self.outermost)
        try:
            again = tracer.trace_watched(set(), Containers())
        except Exception:  # it met a proxy of the first trace
            return True
        return tracer.failure is not None or str(again) != str(graph)

    def _take_notes(self, tracer: _Tracer, branches: set[str], stored: set[tuple[str, str]]) -> None:
        self.notes |= {branches_note(path, self.model.training) for path in branches}
        self.notes |= {_stored_note(path, name) for path, name in stored}
        self.notes |= {_CHECKPOINTED} if tracer.checkpointed else set()
        self.notes |= {_assumed_note(path) for path in tracer.assumed}


def _assumed_note(path: str) -> Diagnostic:
    return Diagnostic(
        "PN119",
        path,
        "the forward asks for the type of a value; the inputs of the model are taken to be tensors",
        "pass example_inputs if they are not",
    )


def resolve_leaves(model: nn.Module, leaves: Sequence[str | type[nn.Module]]) -> frozenset[str]:
    """Paths of the submodules of `model` that `leaves` names, by path or by class.

    Raises:
        ConfigError: an entry names nothing in `model`.
    """
    paths: set[str] = set()
    for leaf in leaves:
        found = {
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if (isinstance(module, leaf) if isinstance(leaf, type) else name == leaf)
        }
        if not found:
            told = leaf.__name__ if isinstance(leaf, type) else repr(leaf)
            raise ConfigError(f"leaves: the model has no module {told}")
        paths |= found
    return frozenset(paths)
