"""int8 for a file that pn_compiler wrote, by onnxruntime's static quantization: a recipe to copy."""

import tempfile
from collections.abc import Iterator  # noqa: TC003  # simpler to copy
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor


class Samples(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Images in batches, as onnxruntime's calibration asks for them."""

    def __init__(self, name: str, images: Tensor) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = iter([{name: x.numpy()} for x in images.split(32)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantize(path: Path, target: Path, images: Tensor, *, everything: bool = False) -> None:
    """Convolutions and matrix products in int8, weights by channel; all that is between in float32.

    A normalizer's weight and bias, a depthwise 1x1 convolution, stays float32 with it.

    Args:
        path, target: the file, and where the other one goes.
        images: [N, C, H, W], from which the ranges of activations are taken.
        everything: sums and pooling in int8, too, for a file whose statistics are constants.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(path, prepared)
        graph = onnx.load(prepared).graph
        quantize_static(
            prepared, target, Samples(graph.input[0].name, images),
            quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=None if everything else ["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=[node.name for node in graph.node if is_affine(node, graph) and not everything],
        )  # fmt: skip


def is_affine(node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    """Whether `node` is a convolution that only multiplies each channel by a number and adds one."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return node.op_type == "Conv" and set(shapes.get(node.input[1], (0,))[1:]) == {1} and any(
        a.name == "group" and a.i == shapes[node.input[1]][0] for a in node.attribute
    )  # fmt: skip
