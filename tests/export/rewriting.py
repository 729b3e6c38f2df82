"""Rewrites of the exporter, applied to what tests build and run: protobuf."""

from collections.abc import Callable

import onnx
import onnx_ir


def apply(rewrite: Callable[[onnx_ir.Model], int], proto: onnx.ModelProto) -> int:
    """Edits `proto` in place and returns what `rewrite` returns."""
    before = onnx.ModelProto()
    before.CopyFrom(proto)  # the constants of the model lie in it
    model = onnx_ir.from_proto(before)
    count = rewrite(model)
    if count:
        proto.CopyFrom(onnx_ir.to_proto(model))
    return count
