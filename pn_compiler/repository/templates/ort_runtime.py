"""Runs an ONNX file in MLServer, which imports this module from the folder of the model."""

import asyncio

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse, MetadataTensor
from mlserver.utils import get_model_uri

DATATYPES = {
    "tensor(float)": "FP32", "tensor(float16)": "FP16", "tensor(double)": "FP64", "tensor(bool)": "BOOL",
    "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32", "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
}  # fmt: skip


class OnnxRuntimeModel(MLModel):  # type: ignore[misc]  # MLServer has its own environment
    """One ONNX file, on onnxruntime's CPU provider."""

    async def load(self) -> bool:
        uri = await get_model_uri(self._settings)
        self._session = onnxruntime.InferenceSession(uri, providers=["CPUExecutionProvider"])
        self.inputs = _describe(self._session.get_inputs())
        self.outputs = _describe(self._session.get_outputs())
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feed = {value.name: NumpyCodec.decode_input(value) for value in payload.inputs}
        names = [output.name for output in (payload.outputs or self.outputs)]
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(None, self._session.run, names, feed)
        except Exception as error:  # a wrong name, shape or element type: the client's mistake
            raise InferenceError(str(error)) from error
        outputs = [
            NumpyCodec.encode_output(name, np.ascontiguousarray(result))
            for name, result in zip(names, results, strict=True)
        ]
        return InferenceResponse(
            model_name=self.name, model_version=self.version, id=payload.id, outputs=outputs
        )


def _describe(values: list[onnxruntime.NodeArg]) -> list[MetadataTensor]:
    return [
        MetadataTensor(
            name=value.name,
            datatype=DATATYPES[value.type],
            shape=[size if isinstance(size, int) else -1 for size in value.shape],
        )
        for value in values
    ]
