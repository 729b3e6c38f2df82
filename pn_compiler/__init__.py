"""Turns BatchNorm networks into batch-independent ones, and those into fast, verified ONNX.

The names below are imported when they are used first: the command answers ``--help``, and Ctrl-C, before
torch is there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pn_compiler import nn
    from pn_compiler.api import fold, transform
    from pn_compiler.checkpoints import convert_state_dict
    from pn_compiler.compilation import compile, export_onnx  # noqa: A004
    from pn_compiler.config import ModelRepository
    from pn_compiler.diagnosis import Diagnosis, SitePower
    from pn_compiler.diagnostics import Diagnostic, Site
    from pn_compiler.distillation import DistillReport, distill
    from pn_compiler.errors import PnCompilerError
    from pn_compiler.freeze_report import FreezeReport, FrozenSite
    from pn_compiler.graph_module import notes, sites
    from pn_compiler.losses import output_loss, relative_l2
    from pn_compiler.moments import proxy_moments
    from pn_compiler.optimizer_groups import param_groups
    from pn_compiler.power import diagnose
    from pn_compiler.serving import export_model_repository
    from pn_compiler.static_statistics import freeze_statistics

__all__ = [
    "Diagnosis",
    "Diagnostic",
    "DistillReport",
    "FreezeReport",
    "FrozenSite",
    "ModelRepository",
    "PnCompilerError",
    "Site",
    "SitePower",
    "compile",
    "convert_state_dict",
    "diagnose",
    "distill",
    "export_model_repository",
    "export_onnx",
    "fold",
    "freeze_statistics",
    "nn",
    "notes",
    "output_loss",
    "param_groups",
    "proxy_moments",
    "relative_l2",
    "sites",
    "transform",
]

_MODULES = {
    "api": ("fold", "transform"),
    "checkpoints": ("convert_state_dict",),
    "compilation": ("compile", "export_onnx"),
    "config": ("ModelRepository",),
    "diagnosis": ("Diagnosis", "SitePower"),
    "diagnostics": ("Diagnostic", "Site"),
    "distillation": ("DistillReport", "distill"),
    "errors": ("PnCompilerError",),
    "freeze_report": ("FreezeReport", "FrozenSite"),
    "graph_module": ("notes", "sites"),
    "losses": ("output_loss", "relative_l2"),
    "moments": ("proxy_moments",),
    "optimizer_groups": ("param_groups",),
    "power": ("diagnose",),
    "serving": ("export_model_repository",),
    "static_statistics": ("freeze_statistics",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("pn_compiler.nn")
    if name not in _HOMES:
        raise AttributeError(f"module 'pn_compiler' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"pn_compiler.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
