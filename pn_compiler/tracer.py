"""The tracer: it records what a graph can repeat, and refuses the rest."""

import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pn_compiler.aliases import tensor_behind, writes
from pn_compiler.autograd_functions import (
    FunctionCall,
    apply_original,
    recorded_functions,
    runs_given_code,
)
from pn_compiler.batch_norms import (
    closed_kind,
    holds_batch_norm,
    is_batch_norm,
    plain_base,
    wraps_batch_norm,
)
from pn_compiler.captured import attributes, functions_of, reachable
from pn_compiler.diagnostics import Diagnostic
from pn_compiler.errors import first_line
from pn_compiler.execution_modes import ExecutionModes
from pn_compiler.functional_norms import NAMES, reaches_batch_norm
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
from pn_compiler.spelling import counts_batches, operator_name
from pn_compiler.trace_watch import PythonWatch, RandomStates, TensorWatch
from pn_compiler.training_flag import training_flags

_LAYERS = (ProxyNormAct.__module__, ReadTraining.__module__)  # all that are there


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
        return {whole_note(self.code or "PN128", self.path, self.reason)}


def whole_note(code: str, path: str, reason: str) -> Diagnostic:
    """That the module at `path` is not traced."""
    hint = "what it calls is converted on its own"
    return Diagnostic(code, path, f"the module stays whole: {reason}", hint)


class Tracer(fx.Tracer):
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
        self.functions: dict[str, FunctionCall] = {}  # by name on the model; there while it is traced
        self.counters: dict[str, str] = {}  # path of a number of batches -> of the module that counts
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
            self._recorded_functions(),
            training_flags(model, self, branches),
            hidden(model, self.leaves),
            self.modes.watched(),
            _watched_attributes(self),
            TensorWatch(self.refuse, model),
            PythonWatch(self.refuse, entered),
        ):
            self.modes_at_entry = [self.modes.now()]
            graph = self.trace(model)
            self._check_quiet()
        self._check_counters(graph)
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

    @contextlib.contextmanager
    def _recorded_functions(self) -> Iterator[None]:
        try:
            with recorded_functions(self.apply_function):
                yield
        finally:
            for path in self.functions:
                del vars(self.model)[path]

    def apply_function(
        self, function: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records the call of an autograd function, which has a backward of its own, as that of a layer."""
        given = list(reachable([args, kwargs]))
        proxies = [value for value in given if type(value) in PROXIES]
        if runs_given_code(function) or not proxies:
            return apply_original(function, args, kwargs)
        if (why := _unrecordable(function, given)) is not None:
            self.refuse(*why)
        paths = [tensor_behind(self.root, proxy.node) for proxy in proxies]
        writes_inputs = any("mark_dirty" in method.__code__.co_names for method in functions_of(function))
        if writes_inputs and any(path is not None and is_parameter(self.root, path) for path in paths):
            self.refuse("PN115", f"{function.__name__}, which the forward applies, writes into a parameter")
        path = next((name for name, held in self.functions.items() if held.function is function), None)
        if path is None:
            path = self.get_fresh_qualname(f"{function.__name__}_call_".lower())
            self.functions[path] = FunctionCall(function)
            vars(self.root)[path] = self.functions[path]  # not as a child: the forward may iterate over those
        self._check_modes()
        return self.create_proxy("call_module", path, args, kwargs)

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
        path = tensor_behind(self.root, node)
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
        if _differentiates(node):
            self.refuse("PN123", "the forward computes gradients, or changes what has them")
        if node.op in ("placeholder", "get_attr"):
            return node
        for target in writes(self.root, node) if node.op != "call_module" else ():
            self._check_write(node, tensor_behind(self.root, target))
        if not is_python_value(self.known(node)):
            self._check_modes()
        return node

    def _check_write(self, node: fx.Node, path: str | None) -> None:
        """Refuses to let `node`, unless it is a batch_norm, write into the parameter or buffer at `path`."""
        if path is None or operator_name(node) in NAMES:
            return
        if is_parameter(self.root, path):
            self.refuse("PN115", f"the forward rewrites {path}")
        if counts_batches(node):
            self.counters.setdefault(path, self.stack[-1])
        else:
            self.refuse("PN118", f"the forward writes into the buffer {path}")

    def sets_counter(self, module: nn.Module, name: str, value: Any) -> bool:
        """Whether a forward adds 1 to how many batches a module has seen, which no graph needs to know."""
        if name not in module._buffers or type(value) not in PROXIES or not counts_batches(value.node):
            return False
        if tensor_behind(self.root, value.node.args[0]) != str(value.node.args[0].target):
            return False
        self.counters.setdefault(str(value.node.args[0].target), self.stack[-1])
        return True

    def _check_counters(self, graph: fx.Graph) -> None:
        """Nothing reads what is counted: graphs do not count."""
        for path, owner in self.counters.items():
            reads = [node for node in graph.find_nodes(op="get_attr") if str(node.target) == path]
            if not all(counts_batches(user) and not user.users for node in reads for user in node.users):
                self.failure = Failure(owner, "PN118", f"the forward counts in {path}, and reads that")

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return (
            path in self.leaves
            or closed_kind(module) is not None
            or (is_batch_norm(module) and not hasattr(type(module), _RECORDS))
            or type(module).__module__ in _LAYERS
            or (super().is_leaf_module(module, path) and not _wraps_whole(module))
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
def _recorded_super_calls(tracer: Tracer) -> Iterator[None]:
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
def _watched_attributes(tracer: Tracer) -> Iterator[None]:
    """Tells `tracer` of each attribute of a module that is set, but for those that torch.fx sets itself."""
    original = nn.Module.__setattr__

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if not str(sys._getframe(1).f_globals.get("__name__")).startswith("torch.fx."):
            if tracer.sets_counter(module, name, value):
                return
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


def _unrecordable(function: type[torch.autograd.Function], given: list[Any]) -> tuple[str, str] | None:
    """Code and reason why a call of `function` on `given` is no operator of a graph, or None."""
    name = function.__name__
    if any(isinstance(v, nn.Module) or callable(v) for v in given if type(v) not in PROXIES):
        return "PN122", f"the forward gives code to {name}.apply"
    if reaches_batch_norm(function):
        return "PN122", f"{name}, which the forward applies, calls batch_norm"
    if may_return_none(function):
        return "PN114", f"{name}, which the forward applies, may return None or not"
    return None


def _differentiates(node: fx.Node) -> bool:
    """Whether `node` depends on how other values were computed, or changes that: passes do not see it."""
    if node.op == "call_method":
        return node.target in ("backward", "register_hook", "requires_grad_", "retain_grad")
    return node.target in (torch.autograd.grad, torch.autograd.backward)


def _wraps_whole(module: nn.Module) -> bool:
    """Whether a container of torch, such as DataParallel, calls modules with BatchNorms: it is entered."""
    return not is_batch_norm(module) and holds_batch_norm(module)


def _reads_training(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names
