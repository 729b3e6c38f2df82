"""Writes of a forward to its modules while it is traced: which a graph repeats, and which it cannot."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from pn_compiler.graph.aliases import tensor_behind, writes
from pn_compiler.inspection.functional_norms import NAMES
from pn_compiler.operators.op_names import counts_batches, operator_name
from pn_compiler.proxies.proxies import PROXIES, is_parameter
from pn_compiler.proxies.trace_failures import Failure, RefusingTracer


class TracedWrites:
    """Attributes, parameters and buffers of modules that forwards write to.

    Attributes:
        writers: path of a module -> those whose forwards set its attributes.
    """

    def __init__(self, tracer: RefusingTracer) -> None:
        self._tracer = tracer
        self.writers: dict[str, set[str]] = {}
        self._counters: dict[str, str] = {}  # path of a number of batches -> of the module that counts

    @contextlib.contextmanager
    def watched(self, is_paused: Callable[[], bool]) -> Iterator[None]:
        """Notices each attribute of a module that is set, but for those that torch.fx sets itself."""
        original = nn.Module.__setattr__

        def set_attribute(module: nn.Module, name: str, value: Any) -> None:
            by_fx = str(sys._getframe(1).f_globals.get("__name__")).startswith("torch.fx.")
            if not by_fx and not is_paused():
                if self._sets_counter(module, name, value):
                    return
                self._set_attribute(module, name, value)
            original(module, name, value)

        nn.Module.__setattr__ = set_attribute  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            nn.Module.__setattr__ = original  # type: ignore[method-assign]

    def _set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        if name in module._parameters or isinstance(value, nn.Parameter):
            self._tracer.refuse("PN115", f"the forward replaces the parameter {name!r}")
        if name == "training":
            self._tracer.refuse("PN118", "the forward switches between train and eval mode")
        path = (self._tracer.submodule_paths or {}).get(module)
        if path is not None:
            self.writers.setdefault(path, set()).add(self._tracer.stack[-1])

    def _sets_counter(self, module: nn.Module, name: str, value: Any) -> bool:
        """Whether a forward adds 1 to how many batches a module has seen, which no graph needs to know."""
        if name not in module._buffers or type(value) not in PROXIES or not counts_batches(value.node):
            return False
        if tensor_behind(self._tracer.root, value.node.args[0]) != str(value.node.args[0].target):
            return False
        self._counters.setdefault(str(value.node.args[0].target), self._tracer.stack[-1])
        return True

    def check(self, node: fx.Node) -> None:
        """Refuses to let `node`, unless it is a batch_norm, write into a parameter or buffer."""
        if node.op == "call_module":
            return
        root = self._tracer.root
        for target in writes(root, node):
            path = tensor_behind(root, target)
            if path is None or operator_name(node) in NAMES:
                continue
            if is_parameter(root, path):
                self._tracer.refuse("PN115", f"the forward rewrites {path}")
            if not counts_batches(node):
                self._tracer.refuse("PN118", f"the forward writes into the buffer {path}")
            self._counters.setdefault(path, self._tracer.stack[-1])

    def check_counters(self, graph: fx.Graph) -> None:
        """Nothing reads what is counted: graphs do not count."""
        for path, owner in self._counters.items():
            reads = [node for node in graph.find_nodes(op="get_attr") if str(node.target) == path]
            if not all(counts_batches(user) and not user.users for node in reads for user in node.users):
                reason = f"the forward counts in {path}, and reads that"
                self._tracer.failure = Failure(owner, "PN118", reason)
