"""From a module to a torch.fx graph, with as little of the model as possible frozen in."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from pn_compiler.diagnostics import Diagnostic
from pn_compiler.errors import TraceError, UnsupportedModelError
from pn_compiler.graph_module import ConvertedModule
from pn_compiler.nn import ReadTraining

_FLAG = "training_flag"
FROZEN_BATCH_NORMS = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d", "FrozenBatchNorm3d")


def is_batch_norm(module: nn.Module) -> bool:
    """Whether `module` is a BatchNorm of any kind: each of them gets a line in the report."""
    return isinstance(module, _BatchNorm) or type(module).__name__ in FROZEN_BATCH_NORMS


def batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every BatchNorm module of `model` with its path, each once."""
    return ((name, module) for name, module in model.named_modules() if is_batch_norm(module))


class TrainingFlag(int):
    """``self.training`` while a model is traced.

    As an argument of a function it is recognised in the graph, where it becomes a read of the flag, so
    that ``F.dropout(x, training=self.training)`` still follows train() and eval(). As a condition it
    notes that the traced branch is fixed.
    """

    path: str
    branches: set[str]

    @classmethod
    def of(cls, module: nn.Module, path: str, branches: set[str]) -> "TrainingFlag":
        flag = cls(module.training)
        flag.path, flag.branches = path, branches
        return flag

    def __bool__(self) -> bool:
        self.branches.add(self.path)
        return int(self) != 0


class _Tracer(fx.Tracer):
    """Enters what may hold a site and its neighbours; leaves whole what needs no entering."""

    def __init__(self, leaves: frozenset[str] = frozenset()) -> None:
        super().__init__(param_shapes_constant=True)
        self.leaves = leaves
        self.stack = [""]  # paths of the modules being traced, outermost first

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return (
            is_batch_norm(module)
            or path in self.leaves
            or type(module).__module__ == ReadTraining.__module__  # all of pn_compiler.nn
            or super().is_leaf_module(module, path)
            or (not holds_batch_norm(module) and _reads_training(module))
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.stack.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.stack.pop()  # not in a finally: after a failure the stack says where
        return result


def holds_batch_norm(module: nn.Module) -> bool:
    return any(is_batch_norm(child) for child in module.modules())


def _reads_training(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


def trace_module(
    module: nn.Module, example_inputs: tuple[Any, ...] | None = None
) -> tuple[ConvertedModule, frozenset[str], tuple[Diagnostic, ...]]:
    """Traces `module`, over its own submodules.

    A submodule whose forward cannot be traced stays whole, as a leaf.

    Args:
        module: the graph shares its parameters and submodules.
        example_inputs: arguments of a call; parameters of forward beyond them keep their defaults.

    Returns:
        The graph, the paths of the leaves that could not be traced, and a note for each module whose
        traced branch depends on ``self.training``.

    Raises:
        TraceError: the forward of `module` itself cannot be traced.
    """
    branches: set[str] = set()
    graph, leaves = _trace_with_leaves(module, example_inputs, branches)
    _read_flags_in_graph(module, graph)
    traced = ConvertedModule(module, graph, type(module).__name__)
    traced.training = module.training
    traced.adopt_hooks(module)
    for name, child in traced.named_modules():
        if name:
            child.training = _training_of(module, name)
    return (
        traced,
        leaves,
        tuple(
            Diagnostic(
                "PN110",
                path,
                f"the forward branches on self.training, traced with training={module.training}",
                "call transform in the mode that the result will be used in",
            )
            for path in sorted(branches)
        ),
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
    model: nn.Module, example_inputs: tuple[Any, ...] | None, branches: set[str]
) -> tuple[fx.Graph, frozenset[str]]:
    """Retries with the innermost failing module as a leaf until the rest can be traced."""
    leaves: frozenset[str] = frozenset()
    defaults = _unused_defaults(model, example_inputs)
    while True:
        tracer = _Tracer(leaves)
        tried: set[str] = set()
        flags = {
            module: module.training
            for name, module in model.named_modules()
            if not tracer.is_leaf_module(module, name)
        }
        names = {module: name for name, module in model.named_modules()}
        try:
            for module in flags:
                object.__setattr__(module, "training", TrainingFlag.of(module, names[module], tried))
            graph = tracer.trace(model, concrete_args=defaults)
        except Exception as error:
            innermost = tracer.stack[-1]
            if innermost == "" or innermost in leaves:
                raise TraceError(f"torch.fx cannot trace {type(model).__name__}.forward: {error}") from error
            leaves = leaves | {innermost}
        else:
            branches |= tried
            return graph, leaves
        finally:
            for module, training in flags.items():
                object.__setattr__(module, "training", training)


def _unused_defaults(model: nn.Module, example_inputs: tuple[Any, ...] | None) -> dict[str, Any] | None:
    """Parameters of forward that a call with `example_inputs` leaves at their defaults."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    given = len(example_inputs) if example_inputs is not None else 1
    defaults = {p.name: p.default for p in parameters[given:] if p.default is not inspect.Parameter.empty}
    return defaults or None


def _read_flags_in_graph(model: nn.Module, graph: fx.Graph) -> None:
    """A recorded TrainingFlag becomes a call that reads the module's flag when the graph runs."""
    for node in list(graph.nodes):
        flags = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, TrainingFlag)]
        if not flags:
            continue
        owner = flags[0].path
        holder = model.get_submodule(owner)
        holder.add_module(_FLAG, ReadTraining().train(holder.training))
        with graph.inserting_before(node):
            read = graph.call_module(f"{owner}.{_FLAG}" if owner else _FLAG)
        node.args = tuple(read if isinstance(a, TrainingFlag) else a for a in node.args)
        node.kwargs = {key: read if isinstance(a, TrainingFlag) else a for key, a in node.kwargs.items()}


def as_inputs(example_inputs: Any) -> tuple[Any, ...] | None:
    """`example_inputs` as the tuple of positional arguments that it stands for."""
    if example_inputs is None or isinstance(example_inputs, tuple):
        return example_inputs
    return tuple(example_inputs) if isinstance(example_inputs, list) else (example_inputs,)
