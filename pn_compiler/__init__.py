"""Turns BatchNorm networks into batch-independent ones, and those into fast, verified ONNX."""

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
