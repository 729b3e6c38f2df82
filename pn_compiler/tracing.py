"""From a module to a torch.fx graph, with as little of the model as possible frozen in."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
from pn_compiler.diagnostics import Diagnostic
from pn_compiler.errors import ConfigError, TraceError, UnsupportedModelError, first_line
from pn_compiler.graph_module import ConvertedModule
from pn_compiler.in_place import InPlaceProxy
from pn_compiler.inputs import Inputs
from pn_compiler.module_state import ModuleState, inside_checkpoint
from pn_compiler.nn import ProxyNormAct, ReadTraining
from pn_compiler.training_flag import branches_note, read_flags_in_graph, training_flags

_LAYERS = (ProxyNormAct.__module__, ReadTraining.__module__)  # all that are there


class _BufferProxy(fx.proxy.ParameterProxy):
    """A proxy whose shape is that of the buffer, as a ParameterProxy's is that of its parameter."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, name: str, buffer: torch.Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)
        self.param = buffer  # type: ignore[assignment]  # only its shape is asked for
        self.name = name


class _Tracer(fx.Tracer):
    """Enters what may hold a site and its neighbours; leaves whole what needs no entering."""

    def __init__(self, model: nn.Module, inputs: Inputs | None, leaves: frozenset[str]) -> None:
        super().__init__(param_shapes_constant=True)
        self.inputs = inputs
        self.leaves = leaves
        self.wrapping = {
            path: module
            for path, module in model.named_modules()
            if path and path not in leaves and wraps_batch_norm(module)
        }
        self.stack = [""]  # paths of the modules being traced, outermost first
        self.checkpointed = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.checkpointed = self.checkpointed or inside_checkpoint()
        return super().create_node(*args, **kwargs)

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
        value = super().getattr(attr, attr_val, parameter_proxy_cache)
        if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
            return value
        name = next((name for name, buffer in self.root.named_buffers() if buffer is value), None)
        if name is None:
            return value
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy(
                "get_attr", name, (), {}, proxy_factory_fn=lambda node: _BufferProxy(self, node, name, value)
            )
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
            self.create_arg((value, default) if default is not inspect.Parameter.empty else value)
        except NotImplementedError:  # nothing that a graph can hold: no argument of the traced forward
            return value
        defaults = () if default is inspect.Parameter.empty else (default,)
        proxy = self.create_proxy("placeholder", name, defaults, {})
        if value is _VARIES or _varies(value):
            return proxy
        check_fixed(proxy, value, name)
        return value

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.stack.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.stack.pop()  # not in a finally: after a failure the stack says where
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


def trace_module(
    module: nn.Module, inputs: Inputs | None = None, leaves: frozenset[str] = frozenset()
) -> tuple[ConvertedModule, frozenset[str], tuple[Diagnostic, ...]]:
    """Traces `module`, over its own submodules.

    A submodule whose forward cannot be traced stays whole, as a leaf.

    Args:
        module: the graph shares its parameters and submodules.
        inputs: arguments of a call; parameters of forward beyond them keep their defaults.
        leaves: paths of submodules that stay whole in any case.

    Returns:
        The graph, the paths of the submodules that stay whole, and a note for each module whose
        traced branch depends on ``self.training``.

    Raises:
        TraceError: the forward of `module` itself cannot be traced.
    """
    notes: set[Diagnostic] = set()
    graph, leaves = _trace_with_leaves(module, inputs, leaves, notes)
    read_flags_in_graph(module, graph)
    traced = ConvertedModule(module, graph, type(module).__name__)
    traced.training = module.training
    traced.adopt_hooks(module)
    for name, child in traced.named_modules():
        if name:
            child.training = _training_of(module, name)
    return traced, leaves, tuple(sorted(notes, key=str))


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


def _trace_with_leaves(
    model: nn.Module, inputs: Inputs | None, leaves: frozenset[str], notes: set[Diagnostic]
) -> tuple[fx.Graph, frozenset[str]]:
    """Retries with the innermost failing module as a leaf until the rest can be traced."""
    while True:
        tracer = _Tracer(model, inputs, leaves)
        tried: set[str] = set()
        before = ModuleState(model)
        try:
            with _recorded_super_calls(tracer), training_flags(model, tracer, tried):
                graph = tracer.trace(model)
        except Exception as error:
            innermost = tracer.stack[-1]
            if innermost == "" or innermost in leaves:
                raise TraceError(
                    f"torch.fx cannot trace {type(model).__name__}.forward: {first_line(error)}"
                ) from error
            leaves = leaves | {innermost}
            continue
        finally:
            stateful, stored = before.changes()
            before.restore()
        if "" in stateful:
            raise TraceError(f"{type(model).__name__}.forward changes attributes of the module")
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
        other = tracer.wrapping.keys() - (called - read)  # never called, or with more to it than the norm
        other |= stateful
        if not other:
            for module in tracer.wrapping.values():
                module.__class__ = plain_base(module)  # what else it does is in the graph
            notes |= {branches_note(path, model.training) for path in tried}
            notes |= {_stored_note(path, name) for path, name in stored}
            notes |= {_CHECKPOINTED} if tracer.checkpointed else set()
            graph._tracer_cls = None  # unpickling traces the generated code, with the tracer of torch.fx
            return graph, leaves
        leaves = leaves | other


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
