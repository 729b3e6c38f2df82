"""Models with their weights in a separate file, because a protobuf message holds at most 2 GB."""

from pathlib import Path

import onnx
import onnx_ir
from torch import nn

_MAX_BYTES = 2**31 - 2**24  # of a message, minus room for the graph
_INLINE_BYTES = 1024  # keeps shapes and the like inline: shape inference needs their values


def needs_external_data(model: nn.Module) -> bool:
    """Whether the weights of `model` are too large for one ONNX file."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) > _MAX_BYTES


def move_weights_out(model: onnx_ir.Model, path: Path) -> None:
    """Writes the weights of `model`, which is to be saved as `path`, to ``<path>.data`` and refers to them.

    They are written one by one, without a second copy in memory.

    Raises:
        OSError: for example, the disk is full.
    """
    onnx_ir.external_data.unload_from_model(
        model, path.parent, f"{path.name}.data", size_threshold_bytes=_INLINE_BYTES
    )


def data_file(proto: onnx.ModelProto, path: Path) -> Path | None:
    """The file that holds the weights of `proto`, saved as `path`; None if they are in `path` itself."""
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return path.parent / f"{path.name}.data"
    return None
