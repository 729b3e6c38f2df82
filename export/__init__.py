"""Exports a folded PyTorch graph to a verified ONNX file, with a report."""

from pn_compiler.base.config import DType, TargetName
from pn_compiler.export.batch_dependence import batch_dependence
from pn_compiler.export.metadata import Description
from pn_compiler.export.narrowing import narrow
from pn_compiler.export.onnx_file import OnnxFile
from pn_compiler.export.options import ExportOptions
from pn_compiler.export.report import Check, Report, count_onnx_operators
from pn_compiler.export.runtimes import DEFAULT_OPSET, check_loadable, choose_opset, oldest_onnxruntime
from pn_compiler.export.sessions import load_session, make_session
from pn_compiler.export.targets import TARGETS
from pn_compiler.export.to_onnx import reference_of, verified_batches, write_onnx
from pn_compiler.export.verify import (
    TOLERANCE,
    Expected,
    default_tolerance,
    expect,
    imitate,
    relative_error,
    verify_onnx,
)

__all__ = [
    "DEFAULT_OPSET",
    "TARGETS",
    "TOLERANCE",
    "Check",
    "DType",
    "Description",
    "Expected",
    "ExportOptions",
    "OnnxFile",
    "Report",
    "TargetName",
    "batch_dependence",
    "check_loadable",
    "choose_opset",
    "count_onnx_operators",
    "default_tolerance",
    "expect",
    "imitate",
    "load_session",
    "make_session",
    "narrow",
    "oldest_onnxruntime",
    "reference_of",
    "relative_error",
    "verified_batches",
    "verify_onnx",
    "write_onnx",
]
