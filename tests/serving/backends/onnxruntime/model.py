"""Stands in for Triton's ONNX backend, which no package brings: onnxruntime in a Python backend.

Triton's core does the rest as ever: it reads config.pbtxt, batches, and speaks HTTP and gRPC. What the real
backend checks of shapes and element types is imitated here, not run.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

TYPES = {
    "tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16", "tensor(double)": "TYPE_FP64",
    "tensor(bool)": "TYPE_BOOL", "tensor(int8)": "TYPE_INT8", "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64", "tensor(uint8)": "TYPE_UINT8",
}  # fmt: skip


class Value(Protocol):
    """What onnxruntime tells of an input or output."""

    name: str
    type: str
    shape: list[int | str]


class TritonPythonModel:
    """One version of a model, in the form that Triton's Python backend expects."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return config

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"])
        path = folder / (config.get("default_model_filename") or "model.onnx")
        if path.is_dir():  # the backend's rule for files with external data
            path /= "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self.batched = int(config.get("max_batch_size", 0)) > 0
        self.inputs = self._check("input", config["input"], self.session.get_inputs())
        self.outputs = self._check("output", config["output"], self.session.get_outputs())

    def _check(self, kind: str, configured: list[dict[str, Any]], values: list[Value]) -> list[str]:
        """Names in the configuration, if shapes and types are those of the file."""
        known = {value.name: value for value in values}
        for entry in configured:
            value = known.get(entry["name"])
            if value is None:
                raise pb_utils.TritonModelException(f"{kind} {entry['name']} is none of {sorted(known)}")
            wanted = [-1] * self.batched + [int(size) for size in entry["dims"]]
            found = [size if isinstance(size, int) else -1 for size in value.shape]
            if wanted != found or entry["data_type"] != TYPES[value.type]:
                raise pb_utils.TritonModelException(
                    f"{kind} {value.name}: {wanted} {entry['data_type']} in config.pbtxt, "
                    f"{found} {TYPES[value.type]} in the file"
                )
        return [entry["name"] for entry in configured]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One call of onnxruntime for all requests that Triton put into the batch."""
        given = [
            [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs]
            for request in requests
        ]
        feed = {name: np.concatenate(arrays) for name, arrays in zip(self.inputs, zip(*given))}  # noqa: B905
        results = self.session.run(self.outputs, feed)
        cuts = np.cumsum([len(arrays[0]) for arrays in given])[:-1]
        parts = [np.split(result, cuts) if len(requests) > 1 else [result] for result in results]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, part[i]) for name, part in zip(self.outputs, parts)]  # noqa: B905
            )
            for i in range(len(requests))
        ]
