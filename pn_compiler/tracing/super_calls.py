"""Traces subclasses of BatchNorm: their call of ``super().forward`` is recorded as the BatchNorm."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from pn_compiler.inspection.batch_norms import plain_base

_RECORDS = "_pn_compiler_records"


def records_super_calls(module: nn.Module) -> bool:
    """Whether `recorded_super_calls` has changed the class of `module`."""
    return hasattr(type(module), _RECORDS)


@contextlib.contextmanager
def recorded_super_calls(tracer: fx.Tracer, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Gives each of `modules`, by path, a class whose ``super().forward`` records a call of the module."""
    changed = {}
    for path, module in modules.items():
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
