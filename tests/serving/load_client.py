"""One client of a load test: many requests at once, each answer compared with onnxruntime in this process.

``python load_client.py http|grpc ADDRESS MODEL FILE REQUESTS SEED`` prints what came back as JSON.
"""

import concurrent.futures
import importlib
import json
import sys
from typing import Any

import numpy as np
import onnxruntime

AT_ONCE = 16
BATCHES = range(1, 17)


def main() -> None:
    protocol, address, model, file, requests, seed = sys.argv[1:]
    library = importlib.import_module(f"tritonclient.{protocol}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    generator = np.random.default_rng(int(seed))
    sizes = generator.choice(BATCHES, int(requests))
    batches = [generator.normal(size=(size, *image.shape[1:])).astype(np.float32) for size in sizes]

    def ask(lane: int) -> list[tuple[int, Any]]:
        """Each lane, one connection, sends every AT_ONCE-th batch."""
        client = library.InferenceServerClient(address)
        answers = []
        for index in range(lane, len(batches), AT_ONCE):
            tensor = library.InferInput(image.name, list(batches[index].shape), "FP32")
            result = client.infer(model, [tensor.set_data_from_numpy(batches[index])])
            answers.append((index, result.as_numpy(logits.name)))
        return answers

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        answers = dict(answer for lane in pool.map(ask, range(AT_ONCE)) for answer in lane)
    worst = 0.0
    for index, batch in enumerate(batches):
        expected = session.run(None, {image.name: batch})[0]
        assert answers[index].shape == expected.shape
        worst = max(worst, float(np.abs(answers[index] - expected).max()))
    print(json.dumps({"answers": len(answers), "samples": int(sum(sizes)), "worst": worst}))  # noqa: T201


if __name__ == "__main__":
    main()
