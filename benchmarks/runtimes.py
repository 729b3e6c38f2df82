"""The runtimes that `benchmarks.latency` times files in."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime

from pn_compiler.export import make_session
from pn_compiler.export.sessions import session_options

#: opens a session of a file for a batch of images and a number of threads; calling what it gives is one run
Runtime = Callable[[bytes, np.ndarray[Any, Any], int], Callable[[], object]]


def onnxruntime_session(content: bytes, images: np.ndarray[Any, Any], threads: int) -> Callable[[], object]:
    session = make_session(content, threads=threads)
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)


def gpu_session(
    provider: str, content: bytes, images: np.ndarray[Any, Any], threads: int
) -> Callable[[], object]:
    """onnxruntime with an execution provider of a GPU; images and results stay in its memory."""
    options = session_options(threads=threads)
    session = onnxruntime.InferenceSession(content, options, providers=[provider])
    binding = session.io_binding()
    binding.bind_ortvalue_input(
        session.get_inputs()[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(images, "cuda", 0)
    )
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def openvino_session(content: bytes, images: np.ndarray[Any, Any], threads: int) -> Callable[[], object]:
    """In float32, for latency. A file for any batch is reshaped first, as OpenVINO recommends.

    Not so with GroupNormalization: of a fixed batch OpenVINO 2026.4 crashes on it (docs/targets.md).
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(content)
    if all(node.get_type_name() != "GroupNormalization" for node in model.get_ops()):
        model.reshape(list(images.shape))
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
    }
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    return lambda: request.infer([images], share_inputs=True)


#: name on the command line -> (name in the output, execution provider) of onnxruntime
PROVIDERS = {
    "cpu": ("onnxruntime", "CPUExecutionProvider"),
    "cuda": ("CUDA", "CUDAExecutionProvider"),
    "tensorrt": ("TensorRT", "TensorrtExecutionProvider"),
}
RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": onnxruntime_session,
    **{
        PROVIDERS[name][0]: functools.partial(gpu_session, PROVIDERS[name][1])
        for name in ("cuda", "tensorrt")
    },
    "OpenVINO": openvino_session,
}

#: OpenVINO 2026.4.1 ends with a segmentation fault on mobilenet_v2 with GroupNormalization of opset 21
CRASHES = {("OpenVINO", "the same, opset 24")}
