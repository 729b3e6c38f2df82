"""Turns BatchNorm networks into batch-independent ones, and those into fast, verified ONNX.

The names below are imported when they are used first: the command answers ``--help``, and Ctrl-C, before
torch is there.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from pn_compiler.base.renamed import RenamedModules

if TYPE_CHECKING:
    from pn_compiler import nn
    from pn_compiler.analysis.diagnosis import Diagnosis, SitePower
    from pn_compiler.analysis.power import diagnose
    from pn_compiler.api import transform
    from pn_compiler.base.diagnostics import Diagnostic, Site
    from pn_compiler.base.errors import PnCompilerError
    from pn_compiler.base.tables import SiteTable
    from pn_compiler.base.user_warnings import ConversionWarning
    from pn_compiler.compilation import compile, export_onnx  # noqa: A004
    from pn_compiler.freezing.freeze_report import FreezeReport, FrozenSite
    from pn_compiler.freezing.static_statistics import freeze_statistics
    from pn_compiler.graph.graph_module import notes, sites
    from pn_compiler.numerics.moments import proxy_moments
    from pn_compiler.parts.features import features
    from pn_compiler.pipeline.folding import fold
    from pn_compiler.recovery.checkpoints import convert_state_dict
    from pn_compiler.recovery.distillation import DistillReport, distill
    from pn_compiler.recovery.optimizer_groups import param_groups
    from pn_compiler.repository.options import ModelRepository
    from pn_compiler.running.losses import output_loss, relative_l2
    from pn_compiler.saving.network_file import load, save
    from pn_compiler.serving import export_model_repository

__all__ = [
    "ConversionWarning",
    "Diagnosis",
    "Diagnostic",
    "DistillReport",
    "FreezeReport",
    "FrozenSite",
    "ModelRepository",
    "PnCompilerError",
    "Site",
    "SitePower",
    "SiteTable",
    "compile",
    "convert_state_dict",
    "diagnose",
    "distill",
    "export_model_repository",
    "export_onnx",
    "features",
    "fold",
    "freeze_statistics",
    "load",
    "nn",
    "notes",
    "output_loss",
    "param_groups",
    "proxy_moments",
    "relative_l2",
    "save",
    "sites",
    "transform",
]

_MODULES = {
    "api": ("transform",),
    "parts.features": ("features",),
    "pipeline.folding": ("fold",),
    "recovery.checkpoints": ("convert_state_dict",),
    "compilation": ("compile", "export_onnx"),
    "repository.options": ("ModelRepository",),
    "analysis.diagnosis": ("Diagnosis", "SitePower"),
    "base.diagnostics": ("Diagnostic", "Site"),
    "recovery.distillation": ("DistillReport", "distill"),
    "base.errors": ("PnCompilerError",),
    "base.tables": ("SiteTable",),
    "base.user_warnings": ("ConversionWarning",),
    "freezing.freeze_report": ("FreezeReport", "FrozenSite"),
    "graph.graph_module": ("notes", "sites"),
    "saving.network_file": ("load", "save"),
    "running.losses": ("output_loss", "relative_l2"),
    "numerics.moments": ("proxy_moments",),
    "recovery.optimizer_groups": ("param_groups",),
    "analysis.power": ("diagnose",),
    "serving": ("export_model_repository",),
    "freezing.static_statistics": ("freeze_statistics",),
}
sys.meta_path.insert(0, RenamedModules())
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
