"""An ONNX file together with its external data."""

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from pn_compiler.base.errors import ExportError
from pn_compiler.export.report import describe_values


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxFile:
    """An ONNX file, read without its external data.

    Attributes:
        files: name in the folder of the model -> path; the first is the model, the others hold its weights.
        inputs, outputs: name, shape and element type, as in a report.
        output_types: numpy types of the outputs.
        opset_version, ir_version: versions of the file.
    """

    files: dict[str, Path]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    output_types: list[np.dtype[Any]]
    opset_version: int
    ir_version: int

    @classmethod
    def read(cls, path: Path) -> "OnnxFile":
        """Reads `path`. Raises ExportError if it cannot be read, is damaged, or lacks external data."""
        try:
            proto = onnx.load(path, load_external_data=False)
        except OSError as error:
            raise ExportError(f"cannot read {path}: {error.strerror}") from error
        except DecodeError as error:
            raise ExportError(f"{path} is damaged, or no ONNX file") from error
        if not proto.graph.output:
            raise ExportError(f"{path} is damaged, or no ONNX file")
        files = {"model.onnx": path}
        for location in sorted(_external_locations(proto.graph)):
            data = path.parent / location
            if not data.resolve().is_relative_to(path.parent.resolve()) or not data.is_file():
                raise ExportError(f"{path} keeps weights in {location}, and there is no such file beside it")
            files[location] = data
        constants = {tensor.name for tensor in proto.graph.initializer}  # old files also list them as inputs
        opsets = {entry.domain: entry.version for entry in proto.opset_import}
        return cls(
            files,
            describe_values([value for value in proto.graph.input if value.name not in constants]),
            describe_values(proto.graph.output),
            [onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in proto.graph.output],
            opsets.get("", opsets.get("ai.onnx", 0)),
            proto.ir_version,
        )

    def copy_to(self, target: Path) -> Path:
        """Copies it to `target`: a file, or a folder of this name if it has external data.

        Returns:
            The path of the ONNX file.
        """
        if len(self.files) == 1:
            shutil.copyfile(self.files["model.onnx"], target)
            return target
        for name, path in self.files.items():
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        return target / "model.onnx"

    def digests(self) -> dict[str, dict[str, Any]]:
        """Bytes and sha256 of each file."""
        return {
            name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in self.files.items()
        }


def _external_locations(graph: onnx.GraphProto) -> set[str]:
    """Names of the files of external data, including those of subgraphs."""
    tensors = [*graph.initializer]
    locations: set[str] = set()
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for subgraph in (attribute.g, *attribute.graphs):
                locations |= _external_locations(subgraph)
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            locations |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    return locations


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
