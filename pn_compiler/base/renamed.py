"""Modules under the names that they had in version 0.1: converted models that were saved then still load."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

RENAMED = {
    f"pn_compiler.{old}": f"pn_compiler.{new}"
    for old, new in {
        "activations": "operators.activations",
        "consumers": "nn.consumers",
        "diagnostics": "base.diagnostics",
        "graph_module": "graph.graph_module",
        "in_place": "operators.in_place",
        "memo": "numerics.memo",
        "tracer": "tracing.fixed_arguments",
    }.items()
}


class RenamedModules(MetaPathFinder, Loader):
    """Imports a module under its old name as what it is now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in RENAMED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(RENAMED[module.__name__])
