"""The models beside this file as a Ray Serve application that speaks the Open Inference Protocol over HTTP.

In this folder, `serve run ray_app:app` serves each NAME/<version>/model.onnx in its newest version, and
`serve run --non-blocking ray_app:app max_replicas=8` leaves it running. The same command replaces the
replicas one by one when a newer version has been added. Needs ray[serve] and onnxruntime.
"""

import asyncio
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import ray
from pydantic import BaseModel, PositiveFloat, PositiveInt
from ray import serve
from ray.serve import Application
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

FOLDER = Path(__file__).resolve().parent
TYPES = {  # of onnxruntime -> of the protocol, of numpy
    "tensor(float)": ("FP32", np.float32), "tensor(float16)": ("FP16", np.float16),
    "tensor(double)": ("FP64", np.float64), "tensor(int64)": ("INT64", np.int64),
    "tensor(int32)": ("INT32", np.int32), "tensor(int8)": ("INT8", np.int8),
    "tensor(uint8)": ("UINT8", np.uint8), "tensor(bool)": ("BOOL", np.bool_),
}  # fmt: skip
EXTENSIONS, HEADER = ["binary_tensor_data"], "inference-header-content-length"
MOST_ROWS = 32  # of one batch; a larger request runs alone
LONGEST_WAIT = 0.002  # seconds that a request waits for others

Arrays = dict[str, np.ndarray]
Outcome = Sequence[np.ndarray] | Exception  # the outputs of a call, or why there are none


class Options(BaseModel):
    """What can stand behind `serve run ray_app:app`, as key=value."""

    min_replicas: PositiveInt = 2
    max_replicas: PositiveInt = 4
    target_ongoing_requests: PositiveFloat = 32  # of a replica; more add replicas ...
    upscale_delay_s: PositiveFloat = 10  # ... if they last
    health_period_s: PositiveFloat = 5  # between health checks of a replica
    health_timeout_s: PositiveFloat = 10  # of a check; the third that fails in a row ends the replica
    cpus: PositiveFloat = 1  # of a replica
    threads: PositiveInt = 1  # of onnxruntime in a replica


def app(options: Options) -> Application:
    """The application, for the newest versions. Raises if there is no model, or one does not load."""
    versions = newest_versions(FOLDER)
    for name, version in versions.items():
        Model(name, version, options.threads)
    scaling = {"min_replicas", "max_replicas", "target_ongoing_requests", "upscale_delay_s"}
    deployment = Models.options(
        autoscaling_config=options.model_dump(include=scaling),
        ray_actor_options={"num_cpus": options.cpus},
        health_check_period_s=options.health_period_s,
        health_check_timeout_s=options.health_timeout_s,
    )
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
        self.joins = all(s[:1] == [-1] for _, s, _ in (*self.inputs.values(), *self.outputs.values()))

    def metadata(self) -> dict[str, Any]:
        about: dict[str, Any] = {"name": self.name, "platform": "onnxruntime"}
        about["versions"] = [str(self.version)]
        for side, table in (("inputs", self.inputs), ("outputs", self.outputs)):
            about[side] = [{"name": n, "datatype": kind, "shape": s} for n, (kind, s, _) in table.items()]
        return about

    def run(self, arrays: Arrays) -> Outcome:
        try:
            return self.session.run(list(self.outputs), arrays)
        except Exception as error:
            return error

    def probe(self) -> None:
        """Runs on one row of zeros, where only the batch axis is free. Raises if that fails."""
        first = [1] if self.joins else []
        shapes = {name: first + shape[len(first) :] for name, (_, shape, _) in self.inputs.items()}
        if all(size >= 0 for shape in shapes.values() for size in shape):
            self.session.run(None, {n: np.zeros(shape, self.inputs[n][2]) for n, shape in shapes.items()})


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

    @staticmethod
    def count_rows(calls: "list[Call]") -> int:
        return sum(call.rows for call in calls)

    def kind(self) -> tuple[Any, ...]:
        """Calls of one kind can share a run."""
        return (self.model.name, *(self.arrays[name].shape[1:] for name in self.model.inputs))


@serve.deployment(max_ongoing_requests=128, graceful_shutdown_timeout_s=30)
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
        except HTTPException as error:
            return JSONResponse({"error": error.detail}, error.status_code)

    async def answer(self, request: Request) -> Response:
        match request.method, *request.url.path.strip("/").split("/"):
            case "GET", "v2":
                return JSONResponse({"name": "ray", "version": ray.__version__, "extensions": EXTENSIONS})
            case "GET", "v2", "health", "live" | "ready":
                return Response()
            case "GET", "v2", "models", name, *rest if rest[-1:] == ["ready"]:
                self.find(name, rest[:-1])
                return Response()
            case "GET", "v2", "models", name, *rest:
                return JSONResponse(self.find(name, rest).metadata())
            case "POST", "v2", "models", name, *rest if rest[-1:] == ["infer"]:
                return await self.infer(self.find(name, rest[:-1]), request)
        raise HTTPException(404, f"there is no {request.method} {request.url.path}")

    def find(self, name: str, rest: list[str]) -> Model:
        """The model at models/<name> or models/<name>/versions/<version>."""
        model = self.models.get(name)
        if model is None:
            raise HTTPException(404, f"there is no model {name}: this server has {', '.join(self.models)}")
        if rest not in ([], ["versions", str(model.version)]):
            raise HTTPException(404, f"{name} is served in version {model.version}, not at {'/'.join(rest)}")
        return model

    async def infer(self, model: Model, request: Request) -> Response:
        header, arrays = decode(await request.body(), request.headers.get(HEADER))
        call = checked(model, arrays)
        wanted = wanted_outputs(header, model)
        if model.joins and call.rows <= MOST_ROWS:
            outcome, together = await self.batch(call)
        else:
            outcome, together = await asyncio.to_thread(model.run, call.arrays), 1
        if isinstance(outcome, Exception):
            raise HTTPException(400, f"onnxruntime does not run {model.name} on this: {outcome}")
        found = dict(zip(model.outputs, outcome, strict=True))
        about = {"model_name": model.name, "model_version": str(model.version)}
        about |= {"parameters": {"replica": self.replica, "requests_in_batch": together}}
        about |= {"id": header["id"]} if "id" in header else {}
        return encode(about, {name: found[name] for name in wanted}, model, wanted)

    @serve.batch(max_batch_size=MOST_ROWS, batch_wait_timeout_s=LONGEST_WAIT, batch_size_fn=Call.count_rows)
    async def batch(self, calls: list[Call]) -> list[tuple[Outcome, int]]:
        """The outcome of each call, and how many calls shared its run."""
        kinds = [call.kind() for call in calls]
        found = {}
        for kind in set(kinds):
            together = [call for call, its in zip(calls, kinds, strict=True) if its == kind]
            outcomes = await asyncio.to_thread(run_together, together)
            found[kind] = iter([(outcome, len(together)) for outcome in outcomes])
        return [next(found[kind]) for kind in kinds]


def run_together(calls: list[Call]) -> list[Outcome]:
    """One run for calls of one kind."""
    model = calls[0].model
    joined = {name: np.concatenate([call.arrays[name] for call in calls]) for name in model.inputs}
    outcome = model.run(joined)
    if isinstance(outcome, Exception):
        return [outcome] * len(calls)
    ends = np.cumsum([call.rows for call in calls])[:-1]
    return list(zip(*(np.split(output, ends) for output in outcome), strict=True))


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
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HTTPException(
            400, f"the request is not one of the Open Inference Protocol: {error!r}"
        ) from error
    return header, arrays


def checked(model: Model, arrays: Arrays) -> Call:
    """Raises HTTPException where names, types or shapes are not those of the inputs."""
    if arrays.keys() != model.inputs.keys():
        raise HTTPException(400, f"{model.name} has the inputs {sorted(model.inputs)}, not {sorted(arrays)}")
    for name, (kind, shape, dtype) in model.inputs.items():
        given = arrays[name]
        if given.dtype != dtype:
            raise HTTPException(400, f"{name} is {kind}, and {given.dtype} was sent")
        if len(shape) != given.ndim or any(s not in (-1, n) for s, n in zip(shape, given.shape, strict=True)):
            raise HTTPException(400, f"{name} has the shape {shape}, and {list(given.shape)} was sent")
    rows = {len(array) for array in arrays.values()} if model.joins else {1}
    if len(rows) != 1 or not min(rows):
        raise HTTPException(400, f"the inputs have {sorted(rows)} rows: expected one number above 0")
    return Call(model, arrays, rows.pop())


def wanted_outputs(header: dict[str, Any], model: Model) -> dict[str, bool]:
    """Name of each output asked for -> whether in binary."""
    binary = bool(header.get("parameters", {}).get("binary_data_output", False))
    asked = header.get("outputs") or [{"name": name} for name in model.outputs]
    wanted = {o["name"]: bool(o.get("parameters", {}).get("binary_data", binary)) for o in asked}
    if unknown := wanted.keys() - model.outputs.keys():
        raise HTTPException(
            400, f"{model.name} has the outputs {sorted(model.outputs)}, not {sorted(unknown)}"
        )
    return wanted


def encode(about: dict[str, Any], outputs: Arrays, model: Model, binary: dict[str, bool]) -> Response:
    described, blobs = [], []
    for name, array in outputs.items():
        tensor = {"name": name, "datatype": model.outputs[name][0], "shape": list(array.shape)}
        if binary[name]:
            blobs.append(array.tobytes())
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        described.append(tensor)
    header = json.dumps(about | {"outputs": described}).encode()
    if not blobs:
        return Response(header, media_type="application/json")
    return Response(b"".join([header, *blobs]), 200, {HEADER: str(len(header))}, "application/octet-stream")
