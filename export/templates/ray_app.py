"""The models beside this file as a Ray Serve application that speaks the Open Inference Protocol over HTTP.

In this folder, `serve run ray_app:app` serves each NAME/<version>/model.onnx in its newest version, and
`serve run --non-blocking ray_app:app max_replicas=8` leaves it running. The same command replaces the
replicas one by one when a newer version has been added. Needs ray[serve] and onnxruntime.
"""

import asyncio
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import ray
from pydantic import BaseModel, PositiveFloat, PositiveInt
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

FOLDER = Path(__file__).resolve().parent
TYPES = {  # of onnxruntime -> of the protocol, of numpy
    "tensor(float)": ("FP32", np.float32),
    "tensor(float16)": ("FP16", np.float16),
    "tensor(double)": ("FP64", np.float64),
    "tensor(int64)": ("INT64", np.int64),
    "tensor(int32)": ("INT32", np.int32),
    "tensor(int8)": ("INT8", np.int8),
    "tensor(uint8)": ("UINT8", np.uint8),
    "tensor(bool)": ("BOOL", np.bool_),
}
HEADER = "inference-header-content-length"
MOST_ROWS = 32  # of one batch; a larger request runs alone
LONGEST_WAIT = 0.002  # seconds that a request waits for others

Arrays = dict[str, np.ndarray]


class RefusedError(Exception):
    """A request that is answered with `status` and the message."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Options(BaseModel):
    """What can stand behind `serve run ray_app:app`, as key=value."""

    min_replicas: PositiveInt = 2
    max_replicas: PositiveInt = 4
    target_ongoing_requests: PositiveFloat = 32  # of a replica; more add replicas ...
    upscale_delay_s: PositiveFloat = 10  # ... if they last
    cpus: PositiveFloat = 1  # of a replica
    threads: PositiveInt = 1  # of onnxruntime in a replica


def app(options: Options) -> Application:
    """The application, for the versions that are newest now.

    Raises:
        FileNotFoundError: there is no model in the folder.
        RuntimeError: onnxruntime does not load one; nothing is deployed then.
    """
    versions = newest_versions(FOLDER)
    for name, version in versions.items():
        Model(name, version, options.threads)
    scaling = {
        "min_replicas": options.min_replicas,
        "max_replicas": max(options.min_replicas, options.max_replicas),
        "target_ongoing_requests": options.target_ongoing_requests,
        "upscale_delay_s": options.upscale_delay_s,
    }
    actor = {"num_cpus": options.cpus}
    deployment = Models.options(autoscaling_config=scaling, ray_actor_options=actor)
    return deployment.bind(versions, options.threads)


def newest_versions(folder: Path) -> dict[str, int]:
    """Name of each model -> its highest version."""
    found = {
        path.name: max(int(version.parent.name) for version in files)
        for path in sorted(folder.iterdir())
        if (files := [f for f in path.glob("*/model.onnx") if f.parent.name.isdigit()])
    }
    if not found:
        raise FileNotFoundError(f"there is no NAME/<version>/model.onnx in {folder}")
    return found


class Model:
    """One session, and what its inputs and outputs are.

    Attributes:
        inputs, outputs: by name, (datatype, shape with -1 where it is free, numpy type).
        joins: whether the first axis of all of them is that of the rows, so that calls can share a run.
    """

    def __init__(self, name: str, version: int, threads: int) -> None:
        self.name, self.version = name, version
        path = FOLDER / name / str(version) / "model.onnx"
        if path.is_dir():  # the weights are in a file of their own
            path /= "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise RuntimeError(f"{name} version {version} does not load: {error}") from None
        self.inputs = tensors(self.session.get_inputs())
        self.outputs = tensors(self.session.get_outputs())
        everything = [*self.inputs.values(), *self.outputs.values()]
        self.joins = all(shape[:1] == [-1] for _, shape, _ in everything)

    def metadata(self) -> dict[str, Any]:
        def table(tensors: dict[str, Any]) -> list[dict[str, Any]]:
            return [{"name": n, "datatype": t, "shape": s} for n, (t, s, _) in tensors.items()]

        about = {"name": self.name, "versions": [str(self.version)], "platform": "onnxruntime_onnx"}
        return about | {"inputs": table(self.inputs), "outputs": table(self.outputs)}

    def run(self, arrays: Arrays) -> list[np.ndarray]:
        return self.session.run(list(self.outputs), arrays)

    def probe(self) -> None:
        """Runs on one row of zeros, where all but the batch axis is fixed. Raises if that fails."""
        shapes = {name: [1, *shape[1:]] for name, (_, shape, _) in self.inputs.items()}
        if all(size >= 0 for shape in shapes.values() for size in shape):
            self.run({name: np.zeros(shape, self.inputs[name][2]) for name, shape in shapes.items()})


def tensors(values: Iterable[Any]) -> dict[str, tuple[str, list[int], Any]]:
    found = {}
    for value in values:
        if value.type not in TYPES:
            raise RuntimeError(f"{value.name} is {value.type}: this server takes {', '.join(TYPES)}")
        kind, dtype = TYPES[value.type]
        found[value.name] = kind, [size if isinstance(size, int) else -1 for size in value.shape], dtype
    return found


class Call(NamedTuple):
    """The arrays of one request, checked: it can't spoil the batch that it gets into."""

    model: Model
    arrays: Arrays
    rows: int

    def kind(self) -> tuple[Any, ...]:
        """Calls of one kind can be one batch."""
        return (self.model.name, *(self.arrays[name].shape[1:] for name in self.model.inputs))


@serve.deployment(
    max_ongoing_requests=128,
    health_check_period_s=5,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=30,
)
class Models:
    """A replica: all models, in the versions that the application was made for."""

    def __init__(self, versions: dict[str, int], threads: int) -> None:
        self.models = {name: Model(name, version, threads) for name, version in versions.items()}
        self.replica = serve.get_replica_context().replica_id.unique_id

    async def check_health(self) -> None:
        """Asked by Ray Serve: a replica whose models don't answer in time is replaced."""
        for model in self.models.values():
            await asyncio.to_thread(model.probe)

    async def __call__(self, request: Request) -> Response:
        try:
            return await self.answer(request)
        except RefusedError as error:
            return JSONResponse({"error": str(error)}, error.status)

    async def answer(self, request: Request) -> Response:
        match request.method, *request.url.path.strip("/").split("/"):
            case "GET", "v2":
                about = {
                    "name": "ray-serve",
                    "version": ray.__version__,
                    "extensions": ["binary_tensor_data"],
                }
                return JSONResponse(about)
            case "GET", "v2", "health", "live" | "ready":
                return Response()
            case "GET", "v2", "models", name, *rest if rest[-1:] == ["ready"]:
                self.find(name, rest[:-1])
                return Response()
            case "GET", "v2", "models", name, *rest:
                return JSONResponse(self.find(name, rest).metadata())
            case "POST", "v2", "models", name, *rest if rest[-1:] == ["infer"]:
                return await self.infer(self.find(name, rest[:-1]), request)
        raise RefusedError(f"there is no {request.method} {request.url.path}", 404)

    def find(self, name: str, rest: list[str]) -> Model:
        """The model at models/<name> or models/<name>/versions/<version>."""
        model = self.models.get(name)
        if model is None:
            raise RefusedError(f"there is no model {name}: this server has {', '.join(self.models)}", 404)
        if rest not in ([], ["versions", str(model.version)]):
            raise RefusedError(f"{name} is served in version {model.version}, not at {'/'.join(rest)}", 404)
        return model

    async def infer(self, model: Model, request: Request) -> Response:
        header, arrays = decode(await request.body(), request.headers.get(HEADER))
        call = checked(model, arrays)
        wanted = wanted_outputs(header, model)
        outputs, together = (
            await self.batch(call)
            if model.joins and call.rows <= MOST_ROWS
            else (await asyncio.to_thread(model.run, call.arrays), 1)
        )
        found = dict(zip(model.outputs, outputs, strict=True))
        about = {
            "model_name": model.name,
            "model_version": str(model.version),
            "parameters": {"replica": self.replica, "requests_in_batch": together},
        } | ({"id": header["id"]} if "id" in header else {})
        return encode(about, {name: found[name] for name in wanted}, model, wanted)

    @serve.batch(
        max_batch_size=MOST_ROWS,
        batch_wait_timeout_s=LONGEST_WAIT,
        batch_size_fn=lambda calls: sum(call.rows for call in calls),
    )
    async def batch(self, calls: list[Call]) -> list[tuple[list[np.ndarray], int]]:
        """The outputs of each call, and how many calls shared its run."""
        results: list[Any] = [None] * len(calls)
        order = sorted(range(len(calls)), key=lambda i: calls[i].kind())
        for _, group in itertools.groupby(order, key=lambda i: calls[i].kind()):
            numbers = list(group)
            parts = await asyncio.to_thread(run_together, [calls[i] for i in numbers])
            for i, part in zip(numbers, parts, strict=True):
                results[i] = (part, len(numbers))
        return results


def run_together(calls: list[Call]) -> Iterable[list[np.ndarray]]:
    """One run for calls of one kind; their outputs."""
    model = calls[0].model
    joined = {name: np.concatenate([call.arrays[name] for call in calls]) for name in model.inputs}
    ends = np.cumsum([call.rows for call in calls])[:-1]
    return zip(*(np.split(output, ends) for output in model.run(joined)), strict=True)


# The protocol: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol --------


def decode(body: bytes, length: str | None) -> tuple[dict[str, Any], Arrays]:
    """The JSON header of a request and its inputs, which are in it or, in binary, behind it."""
    numpy_types = dict(TYPES.values())
    arrays: Arrays = {}
    try:
        start = int(length) if length else len(body)
        header = json.loads(body[:start])
        for tensor in header["inputs"]:
            name, shape, kind = tensor["name"], tensor["shape"], numpy_types[tensor["datatype"]]
            size = tensor.get("parameters", {}).get("binary_data_size")
            if size is None:
                array = np.asarray(tensor["data"], kind)
            else:
                array = np.frombuffer(body[start : start + size], kind)
                start += size
            arrays[name] = array.reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"the request is not one of the Open Inference Protocol: {error!r}") from error
    return header, arrays


def checked(model: Model, arrays: Arrays) -> Call:
    """Raises RefusedError where names, types or shapes are not those of the inputs."""
    if arrays.keys() != model.inputs.keys():
        raise RefusedError(f"{model.name} has the inputs {sorted(model.inputs)}, not {sorted(arrays)}")
    for name, (kind, shape, dtype) in model.inputs.items():
        given = arrays[name]
        if given.dtype != dtype:
            raise RefusedError(f"{name} is {kind}, and {given.dtype} was sent")
        if len(shape) != given.ndim or any(s not in (-1, n) for s, n in zip(shape, given.shape, strict=True)):
            raise RefusedError(f"{name} has the shape {shape}, and {list(given.shape)} was sent")
    rows = {len(array) for array in arrays.values()} if model.joins else {1}
    if len(rows) != 1 or not min(rows):
        raise RefusedError(f"the inputs have {sorted(rows)} rows: expected one number above 0")
    return Call(model, arrays, rows.pop())


def wanted_outputs(header: dict[str, Any], model: Model) -> dict[str, bool]:
    """Name of each output asked for -> whether in binary."""
    binary = bool(header.get("parameters", {}).get("binary_data_output", False))
    asked = header.get("outputs") or [{"name": name} for name in model.outputs]
    wanted = {o["name"]: bool(o.get("parameters", {}).get("binary_data", binary)) for o in asked}
    if unknown := wanted.keys() - model.outputs.keys():
        raise RefusedError(f"{model.name} has the outputs {sorted(model.outputs)}, not {sorted(unknown)}")
    return wanted


def encode(about: dict[str, Any], outputs: Arrays, model: Model, binary: dict[str, bool]) -> Response:
    described, blobs = [], []
    for name, array in outputs.items():
        kind = model.outputs[name][0]
        tensor: dict[str, Any] = {"name": name, "datatype": kind, "shape": list(array.shape)}
        if binary[name]:
            blobs.append(array.tobytes())
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        described.append(tensor)
    header = json.dumps(about | {"outputs": described}).encode()
    if not blobs:
        return Response(header, media_type="application/json")
    content = b"".join([header, *blobs])
    return Response(content, headers={HEADER: str(len(header))}, media_type="application/octet-stream")
