"""From a folded PyTorch graph to a verified ONNX file, and the report about it."""

from pn_compiler.export.files import check_writable, write_atomically
from pn_compiler.export.names import Names
from pn_compiler.export.onnx_file import OnnxFile
from pn_compiler.export.report import Check, Report, count_onnx_operators
from pn_compiler.export.repository import check_repository, write_repository
from pn_compiler.export.runtimes import DEFAULT_OPSET, check_loadable, choose_opset, oldest_onnxruntime
from pn_compiler.export.to_onnx import timed, write_onnx
from pn_compiler.export.verify import (
    TOLERANCE,
    load_session,
    make_session,
    reference_outputs,
    relative_error,
    verify_onnx,
)

__all__ = [
    "DEFAULT_OPSET",
    "TOLERANCE",
    "Check",
    "Names",
    "OnnxFile",
    "Report",
    "check_loadable",
    "check_repository",
    "check_writable",
    "choose_opset",
    "count_onnx_operators",
    "load_session",
    "make_session",
    "oldest_onnxruntime",
    "reference_outputs",
    "relative_error",
    "timed",
    "verify_onnx",
    "write_atomically",
    "write_onnx",
    "write_repository",
]
