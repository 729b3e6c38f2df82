"""What the tests of model repositories share."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf import text_format
from onnx import TensorProto, helper
from torch import nn
from tritonclient.grpc import model_config_pb2

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


def config_of(folder: Path, name: str = "net") -> Any:
    """Read by Triton's whole schema, as tritonclient has it."""
    return text_format.Parse((folder / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def onnx_file(path: Path, nodes: list[Any], output: list[Any], **constants: Any) -> Path:
    """A hand-made graph from "x" [batch, 2, 2] to "y"."""
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)]
    arrays = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", values, outputs, arrays)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path
