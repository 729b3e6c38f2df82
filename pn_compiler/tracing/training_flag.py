"""``self.training`` while a model is traced."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.nn.consumers import ReadTraining

_FLAG = "training_flag"
_WITH_FLAG = (
    "batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "instance_norm",
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "rrelu",
)  # fmt: skip


class TrainingFlag(int):
    """``self.training`` while a model is traced.

    As a function argument it is recognised in the graph and becomes a read of the flag, so that
    ``F.dropout(x, training=self.training)`` still follows train() and eval(). As a condition it records
    that the traced branch is fixed.
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


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a torch `function` so that calls with a TrainingFlag, which it would reject, are recorded."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        tracers = [value.tracer for value in values if isinstance(value, fx.Proxy)]
        if not tracers or not any(isinstance(value, TrainingFlag) for value in values):
            return function(*args, **kwargs)
        return tracers[0].create_proxy("call_function", function, args, kwargs)

    return call


@contextlib.contextmanager
def training_flags(model: nn.Module, tracer: fx.Tracer, branches: set[str]) -> Iterator[None]:
    """Replaces ``training`` by a TrainingFlag in each module that is traced into."""
    flags = {
        module: (name, module.training)
        for name, module in model.named_modules()
        if not tracer.is_leaf_module(module, name)
    }
    torch.overrides.get_overridable_functions()  # cached at the first call, which must precede the patches
    functions = {name: getattr(torch, name) for name in _WITH_FLAG}
    try:
        for module, (name, _) in flags.items():
            object.__setattr__(module, "training", TrainingFlag.of(module, name, branches))
        for name, function in functions.items():
            setattr(torch, name, _recording(function))
        yield
    finally:
        for name, function in functions.items():
            setattr(torch, name, function)
        for module, (_, training) in flags.items():
            object.__setattr__(module, "training", training)


def read_flags_in_graph(model: nn.Module, graph: fx.Graph) -> None:
    """Turns a recorded TrainingFlag into a call that reads the module's flag when the graph runs."""
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


def branches_note(path: str, training: bool) -> Diagnostic:
    return Diagnostic(
        "PN110",
        path,
        f"the forward branches on self.training, traced with training={training}",
        "call transform in the mode that the result will be used in",
    )
