"""The runtimes that `benchmarks.latency` times files in, on the CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pn_compiler.export import make_session

#: opens a session of a file for a batch of images and a number of threads; calling what it gives is one run
Runtime = Callable[[bytes, np.ndarray[Any, Any], int], Callable[[], object]]


def onnxruntime_session(content: bytes, images: np.ndarray[Any, Any], threads: int) -> Callable[[], object]:
    session = make_session(content, threads=threads)
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)


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


RUNTIMES: dict[str, Runtime] = {"onnxruntime": onnxruntime_session, "OpenVINO": openvino_session}

#: OpenVINO 2026.4.1 ends with a segmentation fault on mobilenet_v2 with GroupNormalization of opset 21
CRASHES = {("OpenVINO", "the same, opset 24")}
