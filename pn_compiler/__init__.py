"""Turns BatchNorm networks into batch-independent ones, and those into fast, verified ONNX."""

from pn_compiler import nn
from pn_compiler.api import compile, export_onnx, fold, transform  # noqa: A004  # public names
from pn_compiler.checkpoints import convert_state_dict
from pn_compiler.diagnosis import Diagnosis, SitePower
from pn_compiler.diagnostics import Diagnostic, Site
from pn_compiler.errors import PnCompilerError
from pn_compiler.graph_module import notes, sites
from pn_compiler.moments import proxy_moments
from pn_compiler.optimizer_groups import param_groups
from pn_compiler.power import diagnose

__all__ = [
    "Diagnosis",
    "Diagnostic",
    "PnCompilerError",
    "Site",
    "SitePower",
    "compile",
    "convert_state_dict",
    "diagnose",
    "export_onnx",
    "fold",
    "nn",
    "notes",
    "param_groups",
    "proxy_moments",
    "sites",
    "transform",
]
