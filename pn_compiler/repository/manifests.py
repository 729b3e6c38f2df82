"""What MLServer and KServe read beside the model."""

import re
from importlib import resources
from typing import Any

import yaml

from pn_compiler.base import strict_json

#: MLServer's settings for all models: its worker processes fail with uvloop 0.22, and its limit of a gRPC
#: message, 4 MB, is less than 8 images.
SERVER_SETTINGS = {"parallel_workers": 0, "grpc_max_message_length": 2**28}

#: Files that are copied as they are: into the folder of a model, and into that of all models.
MODEL_TEMPLATES = ("ort_runtime.py",)
SERVER_TEMPLATES = ("ray_app.py",)

_BATCH_TIME = 0.002  # seconds that a request waits for others to share a batch with


def server_files(directory: str) -> dict[str, bytes]:
    """Name -> content of what lies beside the models; `directory` is the name of their folder."""
    service = _inference_service(directory).encode()
    return {"settings.json": to_json(SERVER_SETTINGS), "kserve.yaml": service} | _templates(SERVER_TEMPLATES)


def model_files(name: str, version: int, file: str, max_batch_size: int) -> dict[str, bytes]:
    """Name -> content of what lies beside the versions of a model; `file` is relative to it."""
    settings = _model_settings(name, version, file, max_batch_size)
    return {"model-settings.json": to_json(settings)} | _templates(MODEL_TEMPLATES)


def _templates(names: tuple[str, ...]) -> dict[str, bytes]:
    folder = resources.files("pn_compiler.repository") / "templates"
    return {name: (folder / name).read_bytes() for name in names}


def _model_settings(name: str, version: int, file: str, max_batch_size: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "name": name,
        "implementation": "ort_runtime.OnnxRuntimeModel",
        "parameters": {"uri": f"./{file}", "version": str(version)},
    }
    if max_batch_size:
        settings |= {"max_batch_size": max_batch_size, "max_batch_time": _BATCH_TIME}
    return settings


def _inference_service(directory: str) -> str:
    """A KServe InferenceService, as YAML: Triton with all models of a folder on the volume claim "models"."""
    name = re.sub(r"[^a-z0-9]+", "-", directory.lower()).strip("-")[:50] or "models"  # as names in DNS are
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "onnx"},
                    "protocolVersion": "v2",
                    "runtime": "kserve-tritonserver",
                    "storageUri": f"pvc://models/{directory}",
                }
            }
        },
    }
    text: str = yaml.safe_dump(service, sort_keys=False)
    return text


def to_json(content: dict[str, Any]) -> bytes:
    return strict_json.to_json(content).encode()
