"""What MLServer and KServe read beside the model."""

import json
import re
from importlib import resources
from typing import Any

import yaml

#: Files that are copied into the folder of the model, those of them that there are.
TEMPLATES = ("ort_runtime.py", "ray_app.py")

#: MLServer's settings for all models: its worker processes fail with uvloop 0.22, and its limit of a
#: gRPC message, 4 MB, is less than 8 images.
SERVER_SETTINGS = {"parallel_workers": 0, "grpc_max_message_length": 2**28}

_BATCH_TIME = 0.002  # seconds that a request waits for others to share a batch with


def templates() -> dict[str, bytes]:
    folder = resources.files("pn_compiler.export") / "templates"
    return {name: (folder / name).read_bytes() for name in TEMPLATES if (folder / name).is_file()}


def model_settings(name: str, version: int, file: str, max_batch_size: int) -> dict[str, Any]:
    """MLServer's ``model-settings.json``; `file` is relative to it."""
    settings: dict[str, Any] = {
        "name": name,
        "implementation": "ort_runtime.OnnxRuntimeModel",
        "parameters": {"uri": f"./{file}", "version": str(version)},
    }
    if max_batch_size:
        settings |= {"max_batch_size": max_batch_size, "max_batch_time": _BATCH_TIME}
    return settings


def inference_service(name: str, repository: str) -> str:
    """A KServe InferenceService on Triton, as YAML; `repository` is the name of the folder of models.

    The storage is a persistent volume claim, ``<name>-models``, that holds this folder.
    """
    host = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50]  # a name in Kubernetes is a name in DNS
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": host},
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "onnx"},
                    "protocolVersion": "v2",
                    "runtime": "kserve-tritonserver",
                    "storageUri": f"pvc://{host}-models/{repository}",
                }
            }
        },
    }
    text: str = yaml.safe_dump(service, sort_keys=False)
    return text


def to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
