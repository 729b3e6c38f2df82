"""onnxruntime sessions on the CPU."""

import onnxruntime

from pn_compiler.base.errors import ExportError, first_line


def session_options(*, optimized: bool = True, threads: int = 0) -> onnxruntime.SessionOptions:
    """Options that only log errors; `threads` 0 means all cores."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    return options


def make_session(
    model: bytes | str, *, optimized: bool = True, threads: int = 0
) -> onnxruntime.InferenceSession:
    """An onnxruntime CPU session, with `session_options`."""
    options = session_options(optimized=optimized, threads=threads)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def load_session(path: str, *, optimized: bool = True, threads: int = 0) -> onnxruntime.InferenceSession:
    """A session for a file, loaded as a server does: external data must be next to it.

    Raises:
        ExportError: onnxruntime cannot load it.
    """
    try:
        return make_session(path, optimized=optimized, threads=threads)
    except Exception as error:
        raise ExportError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
