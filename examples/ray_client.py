"""Sends many requests at once to a server, retries, and compares each answer with onnxruntime.

    .venv-ray/bin/python examples/ray_client.py http://127.0.0.1:8000 digits demo_output/model.onnx

Prints one line of JSON: how many requests were answered, how many of them not at the first attempt, and how
many never. Inference has no side effects, so that asking again is safe.
"""

import argparse
import asyncio
import collections
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import onnxruntime

HEADER = "Inference-Header-Content-Length"
TOLERANCE = 1e-5
PAUSE = 0.05  # seconds before the second attempt, twice as long before each one after it


class Client:
    """Requests for one model, with binary tensors.

    Attributes:
        counts: requests that were answered, retried, lost in spite of it,
            and answered wrongly.
        reasons: why attempts failed -> how often.
        served: (version, replica) -> answers.
    """

    def __init__(self, url: str, model: str, files: list[Path], *, attempts: int = 8) -> None:
        self.url, self.attempts = f"{url}/v2/models/{model}/infer", attempts
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = [
            onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in files
        ]
        self.input = self.sessions[0].get_inputs()[0]
        self.counts = dict.fromkeys(("answered", "retried", "lost", "wrong"), 0)
        self.reasons: collections.Counter[str] = collections.Counter()
        self.served: collections.Counter[tuple[str, str]] = collections.Counter()
        self.largest_batch = 0
        self.largest_error = 0.0
        self.seconds: list[float] = []

    def images(self, rows: int, random: np.random.Generator) -> np.ndarray:
        return random.random((rows, *self.input.shape[1:]), dtype=np.float32)

    async def ask(self, http: aiohttp.ClientSession, images: np.ndarray) -> None:
        """One request, repeated until it is answered, and its answer compared."""
        start = time.perf_counter()
        for attempt in range(self.attempts):
            if attempt:
                self.counts["retried"] += attempt == 1
                await asyncio.sleep(PAUSE * 2**attempt)
            try:
                header, logits = await self._post(http, images)
            except (aiohttp.ClientError, TimeoutError) as error:
                self.reasons[f"{type(error).__name__} {getattr(error, 'status', '')}".strip()] += 1
                continue
            self.counts["answered"] += 1
            self.seconds.append(time.perf_counter() - start)
            self._compare(header, logits, images)
            return
        self.counts["lost"] += 1

    async def _post(
        self, http: aiohttp.ClientSession, images: np.ndarray
    ) -> tuple[dict[str, Any], np.ndarray]:
        tensor = {"name": self.input.name, "datatype": "FP32", "shape": images.shape}
        header = json.dumps({
            "inputs": [tensor | {"parameters": {"binary_data_size": images.nbytes}}],
            "parameters": {"binary_data_output": True},
        }).encode()  # fmt: skip
        headers = {HEADER: str(len(header))}
        async with http.post(self.url, data=header + images.tobytes(), headers=headers) as response:
            response.raise_for_status()
            body, length = await response.read(), int(response.headers[HEADER])
        found = json.loads(body[:length])
        return found, np.frombuffer(body[length:], np.float32).reshape(found["outputs"][0]["shape"])

    def _compare(self, header: dict[str, Any], logits: np.ndarray, images: np.ndarray) -> None:
        version, about = header["model_version"], header["parameters"]
        self.served[version, about["replica"]] += 1
        self.largest_batch = max(self.largest_batch, about["requests_in_batch"])
        expected = self.sessions[int(version) - 1].run(None, {self.input.name: images})[0]
        error = float(np.abs(logits - expected).max()) if logits.shape == expected.shape else np.inf
        self.largest_error = max(self.largest_error, error)
        self.counts["wrong"] += error > TOLERANCE

    def report(self) -> dict[str, Any]:
        versions: collections.Counter[str] = collections.Counter()
        replicas: collections.Counter[str] = collections.Counter()
        for (version, replica), answers in self.served.items():
            versions[version] += answers
            replicas[replica] += answers
        return self.counts | {
            "reasons": self.reasons,
            "versions": versions,
            "replicas": replicas,
            "largest_batch": self.largest_batch,
            "largest_error": self.largest_error,
            "median_ms": 1000 * float(np.median(self.seconds)) if self.seconds else None,
        }


async def ask_all(client: Client, requests: int, seed: int) -> None:
    """All `requests` at the same time, of 1 to 16 images each."""
    random = np.random.default_rng(seed)
    batches = [client.images(int(rows), random) for rows in random.integers(1, 17, requests)]
    async with _http() as http:
        await asyncio.gather(*(client.ask(http, images) for images in batches))


async def ask_until(client: Client, stop: asyncio.Event, *, users: int, seed: int) -> None:
    """`users` that send one request after the other until `stop` is set; none is aborted."""

    async def user(number: int) -> None:
        random = np.random.default_rng((seed, number))
        while not stop.is_set():
            await client.ask(http, client.images(int(random.integers(1, 17)), random))

    async with _http() as http:
        await asyncio.gather(*map(user, range(users)))


def _http() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=120)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("model", help="its name on the server")
    parser.add_argument("files", nargs="+", type=Path, help="ONNX files of its versions 1, 2, ...")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--users", type=int, help="ask until standard input ends, this many at a time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    client = Client(arguments.url, arguments.model, arguments.files)
    if arguments.users is None:
        await ask_all(client, arguments.requests, arguments.seed)
    else:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_reader(0, stop.set)
        await ask_until(client, stop, users=arguments.users, seed=arguments.seed)
    print(json.dumps(client.report()))


if __name__ == "__main__":
    asyncio.run(main())
