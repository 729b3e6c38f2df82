"""From a folded PyTorch graph to a verified ONNX file, and the report about it."""

from pn_compiler.export.files import check_writable, write_atomically
from pn_compiler.export.half import DType, check_dtype
from pn_compiler.export.report import Check, Report, count_onnx_operators
from pn_compiler.export.to_onnx import DEFAULT_OPSET, timed, verified_batches, write_onnx
from pn_compiler.export.verify import TOLERANCE, Expected, expect, make_session, relative_error, verify_onnx

__all__ = [
    "DEFAULT_OPSET",
    "TOLERANCE",
    "Check",
    "DType",
    "Expected",
    "Report",
    "check_dtype",
    "check_writable",
    "count_onnx_operators",
    "expect",
    "make_session",
    "relative_error",
    "timed",
    "verified_batches",
    "verify_onnx",
    "write_atomically",
    "write_onnx",
]
