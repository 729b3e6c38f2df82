"""Records calls of autograd functions, each as one operator of the graph."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from pn_compiler.graph.aliases import tensor_behind
from pn_compiler.inspection.captured import functions_of, reachable
from pn_compiler.inspection.functional_norms import reaches_batch_norm
from pn_compiler.proxies.autograd_functions import (
    FunctionCall,
    apply_original,
    recorded_functions,
    runs_given_code,
)
from pn_compiler.proxies.known_types import may_return_none
from pn_compiler.proxies.proxies import PROXIES, is_parameter
from pn_compiler.proxies.trace_failures import RefusingTracer


class FunctionCalls:
    """The autograd functions that a traced forward applies, as layers of the model.

    Attributes:
        layers: by attribute name on the model, which holds them while it is traced.
    """

    def __init__(self, tracer: RefusingTracer) -> None:
        self._tracer = tracer
        self.layers: dict[str, FunctionCall] = {}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        try:
            with recorded_functions(self._apply):
                yield
        finally:
            for path in self.layers:
                del vars(self._tracer.root)[path]

    def _apply(
        self, function: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records the call of an autograd function, which has its own backward, as a call of a layer."""
        root = self._tracer.root
        given = list(reachable([args, kwargs]))
        proxies = [value for value in given if type(value) in PROXIES]
        if runs_given_code(function) or not proxies:
            return apply_original(function, args, kwargs)
        if (why := _unrecordable(function, given)) is not None:
            self._tracer.refuse(*why)
        paths = [tensor_behind(root, proxy.node) for proxy in proxies]
        writes_inputs = any("mark_dirty" in method.__code__.co_names for method in functions_of(function))
        if writes_inputs and any(path is not None and is_parameter(root, path) for path in paths):
            reason = f"{function.__name__}, which the forward applies, writes into a parameter"
            self._tracer.refuse("PN115", reason)
        return self._tracer.create_proxy("call_module", self._layer(function), args, kwargs)

    def _layer(self, function: type[torch.autograd.Function]) -> str:
        """The name of the layer that applies `function`."""
        for name, layer in self.layers.items():
            if layer.function is function:
                return name
        path = self._tracer.get_fresh_qualname(f"{function.__name__}_call_".lower())
        self.layers[path] = FunctionCall(function)
        # not as a child module: the forward may iterate over its children
        vars(self._tracer.root)[path] = self.layers[path]
        return path


def _unrecordable(function: type[torch.autograd.Function], given: list[Any]) -> tuple[str, str] | None:
    """Code and reason why a call of `function` on `given` cannot be an operator of a graph, or None."""
    name = function.__name__
    if any(isinstance(v, nn.Module) or callable(v) for v in given if type(v) not in PROXIES):
        return "PN122", f"the forward gives code to {name}.apply"
    if reaches_batch_norm(function):
        return "PN122", f"{name}, which the forward applies, calls batch_norm"
    if may_return_none(function):
        return "PN114", f"{name}, which the forward applies, may return None or not"
    return None


def differentiates(node: fx.Node) -> bool:
    """Whether `node` depends on, or changes, how other values were computed, which passes do not see."""
    if node.op == "call_method":
        return node.target in ("backward", "register_hook", "requires_grad_", "retain_grad")
    return node.target in (torch.autograd.grad, torch.autograd.backward)
