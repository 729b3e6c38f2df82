"""The tracer: records what a graph can repeat, and refuses the rest."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from pn_compiler.base.errors import first_line
from pn_compiler.graph.aliases import tensor_behind
from pn_compiler.inspection.batch_norms import closed_kind, holds_batch_norm, is_batch_norm, wraps_batch_norm
from pn_compiler.inspection.captured import attributes, reachable
from pn_compiler.inspection.containers import Containers
from pn_compiler.inspection.execution_modes import ExecutionModes
from pn_compiler.inspection.module_state import ModuleState, hidden, inside_checkpoint
from pn_compiler.nn import AnchoredNorm, ProxyNormAct, ReadTraining
from pn_compiler.proxies.known_types import SAMPLE, UNKNOWN, is_python_value, may_return_none, sample_of
from pn_compiler.proxies.proxies import PROXIES, TracedProxy, module_proxy
from pn_compiler.proxies.trace_failures import RefusingTracer
from pn_compiler.proxies.trace_watch import PythonWatch, TensorWatch
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.random_states import RandomStates
from pn_compiler.tracing.function_calls import FunctionCalls, differentiates
from pn_compiler.tracing.super_calls import recorded_super_calls, records_super_calls
from pn_compiler.tracing.traced_arguments import TracedArguments
from pn_compiler.tracing.traced_ranks import TracedRanks
from pn_compiler.tracing.traced_writes import TracedWrites
from pn_compiler.tracing.training_flag import training_flags

_LAYERS = (ProxyNormAct.__module__, AnchoredNorm.__module__, ReadTraining.__module__)  # all that are there


class Tracer(RefusingTracer):
    """Traces into modules that may hold a site or its neighbours; keeps the others whole.

    Args:
        model: the model to trace.
        inputs: arguments of a call, which decide what varies; None if none are known.
        leaves: paths of submodules that stay whole.
        outermost: whether the user calls the model: arguments of unknown type are taken to be tensors.
        example: returns arguments of a call, from which ranks are derived; called when first needed.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs | None,
        leaves: frozenset[str],
        outermost: bool,
        example: Callable[[], Inputs | None],
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.leaves = leaves
        self.wrapping = {
            path: module
            for path, module in model.named_modules()
            if path and path not in leaves and wraps_batch_norm(module)
        }
        self.tapped: dict[str, list[Any]] = {}  # path of a module whose outputs are asked for -> these
        self.checkpointed = False
        self.assumed: set[str] = set()  # paths of modules that asked for the type of an unknown input
        self.asked_rank: set[str] = set()  # paths of modules that asked for a number of dimensions
        self.modes = ExecutionModes()
        self.modes_at_entry = [self.modes.now()]
        self.random = RandomStates()
        self.state: ModuleState | None = None  # if given, checked whenever a module begins or ends
        self.also_whole: set[str] = set()
        self.functions, self.writes = FunctionCalls(self), TracedWrites(self)
        self.arguments = TracedArguments(self, inputs, example, SAMPLE if outermost else UNKNOWN)
        self.ranks = TracedRanks(model, self.arguments.examples, self._pause)
        self._paused = False

    def trace_watched(self, branches: set[str], containers: Containers) -> fx.Graph:
        """Traces the model. Adds to `branches` the paths of modules that branch on self.training."""

        def entered(names: dict[str, Any]) -> None:
            containers.add_globals(names)
            for value in names.values():
                self.random.note(value)

        model = self.model
        for module in model.modules():
            for value in reachable(attributes(module)):
                self.random.note(value)
        with (
            _functions_not_compiled(),
            recorded_super_calls(self, self.wrapping),
            self.functions.recorded(),
            training_flags(model, self, branches),
            hidden(model, self.leaves),
            self.modes.watched(),
            self.writes.watched(lambda: self._paused),
            TensorWatch(self.refuse, model),
            PythonWatch(self.refuse, entered),
        ):
            self.modes_at_entry = [self.modes.now()]
            graph = self.trace(model)
            self._check_quiet()
        self.writes.check_counters(graph)
        if self.ranks.answered:
            self.arguments.fix_shapes(graph, channels=self.ranks.counted)
        return graph

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """A context for code that is not part of the forward; it preserves the random states."""
        profiler, states = sys.getprofile(), RandomStates()
        sys.setprofile(None)
        self._paused = True
        try:
            with _disable_current_modes():
                yield
        finally:
            self._paused = False
            states.restore()
            sys.setprofile(profiler)

    def _check_quiet(self) -> None:
        """Refuses if random numbers were drawn or shared state was changed since the last check."""
        if (moved := self.random.moved()) is not None:
            self.refuse("PN117", moved)
        if self.state is None:
            return
        if self.state.rewritten():
            self.refuse("PN115", "the forward rewrites parameters")
        if owners := self.state.containers.changed():
            self.also_whole |= owners
            self.refuse("PN118", "the forward changes a list, dict or variable that outlives the call")

    def _check_modes(self) -> None:
        now, before = self.modes.now(), self.modes_at_entry[-1]
        if now != before and (now[1] != before[1] or not inside_checkpoint()):
            self.failed("PN116", "the forward computes under a mode of its own (no_grad, autocast, ...)")

    def known(self, node: fx.Node) -> Any:
        """A value of the type that `node` has in a call, or UNKNOWN."""
        return sample_of(node, self.root, self.arguments.samples)

    def type_was_asked(self, proxy: fx.Proxy) -> None:
        if self.inputs is None and proxy.known() is not UNKNOWN:
            self.assumed.add(self.stack[-1])

    def rank(self, node: fx.Node) -> int | None:
        """The number of dimensions of the tensor `node`, None if unknown; the graph will check it."""
        return self._noted(self.ranks.of(node))

    def length(self, node: fx.Node) -> int | None:
        """The number of sizes or pieces of `node`, None if unknown; the graph will check it."""
        return None if isinstance(self.known(node), torch.Tensor) else self._noted(self.ranks.of_items(node))

    def _noted(self, rank: int | None) -> int | None:
        if rank is not None:
            self.asked_rank.add(self.stack[-1])
        return rank

    def write_of(self, node: fx.Node, what: str) -> tuple[str | None, str]:
        """Code and reason for refusing a write by the forward to the value of `node`."""
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
        length = self.length(obj.node)
        if length is not None:
            return iter([obj[index] for index in range(length)])  # type: ignore[index]
        self.failed(None, f"the forward iterates over {obj!r}")
        return super().iter(obj)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.checkpointed = self.checkpointed or inside_checkpoint()
        node = super().create_node(*args, **kwargs)
        if differentiates(node):
            self.refuse("PN123", "the forward computes gradients, or changes what has them")
        if node.op in ("placeholder", "get_attr"):
            return node
        self.writes.check(node)
        if not is_python_value(self.known(node)):
            self._check_modes()
        return node

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return (
            path in self.leaves
            or closed_kind(module) is not None
            or (is_batch_norm(module) and not records_super_calls(module))
            or type(module).__module__ in _LAYERS
            or (super().is_leaf_module(module, path) and not _wraps_whole(module))
            or (not holds_batch_norm(module) and _reads_training(module))
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Records reads of buffers, like those of parameters: what is computed from one must follow it."""
        if self._paused or not isinstance(attr_val, torch.Tensor):
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
        # the forward must see what it sees in a real call; torch.fx resets the flag after the trace
        fx._symbolic_trace._is_fx_tracing_flag = False
        return self.arguments.bind(self.root.forward, self.root), []

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._paused or self._is_made_here(m):
            return forward(*args, **kwargs)
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
        if self.stack[-1] in self.tapped:
            self.tapped[self.stack[-1]].append(result)
        self.stack.pop()  # not in a finally: after a failure the stack says where
        self.modes_at_entry.pop()
        return result

    def _is_made_here(self, module: nn.Module) -> bool:
        """Whether the forward itself created `module`, as in ``nn.ReLU()(x)``, and it has no state."""
        if self.submodule_paths is None or module in self.submodule_paths:
            return False
        tensors = (*module.parameters(), *module.buffers())
        return not tensors and not is_batch_norm(module) and closed_kind(module) is None


def _functions_not_compiled() -> contextlib.AbstractContextManager[Any]:
    """Runs the original of functions wrapped by torch.compile, which can be traced."""
    wrapped = "torch._dynamo" in sys.modules  # which takes a second to import
    return torch.compiler.set_stance("force_eager") if wrapped else contextlib.nullcontext()


def _wraps_whole(module: nn.Module) -> bool:
    """Whether `module` is a torch container, such as DataParallel, around BatchNorms, to trace into."""
    return not is_batch_norm(module) and holds_batch_norm(module)


def _reads_training(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names
