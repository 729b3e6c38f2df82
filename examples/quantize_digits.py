"""int8 for the digits network that ``make demo`` compiled, by onnxruntime's static quantization.

make demo
.venv/bin/python examples/quantize_digits.py
"""

import argparse
import collections
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from digits import OUTPUT, latency, load_data, run_onnx
from quantization import quantize

SAMPLES = 256  # training images to take ranges of activations from
ROUNDS = 5  # of timing, in turns


def operators(path: Path) -> dict[str, int]:
    """What onnxruntime runs for a file: its operators after optimization."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    return dict(collections.Counter(node.op_type for node in nodes).most_common())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=OUTPUT, help="with what examples/digits.py made")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing")
    arguments = parser.parse_args(argv)
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime.quantization talks to the root logger
    images, _, test_images, test_labels = load_data()
    networks = {"BatchNorm": "batch_norm.onnx", "compiled": "model.onnx", "compiled, tuned": "tuned.onnx"}
    paths = {}
    for title, name in networks.items():
        path = arguments.folder / name
        if not path.exists():
            parser.error(f"there is no {path}: run make demo first")
        paths[f"{title}, float32"] = path
        paths[f"{title}, int8"] = path.with_suffix(".int8.onnx")
        quantize(path, path.with_suffix(".int8.onnx"), images[:SAMPLES])

    times = [
        {title: latency(path, test_images[:1]) for title, path in paths.items()}
        for _ in range(arguments.rounds)
    ]
    print(f"{'network':<26}{'accuracy':>9}{'size':>10}{'latency':>9}{'error':>9}")
    for title, path in paths.items():
        logits = run_onnx(path, test_images)
        exact = run_onnx(paths[title.replace("int8", "float32")], test_images)
        right = 100 * float((logits.argmax(1) == test_labels).double().mean())
        ratio = float(np.median([each[title] / each["BatchNorm, float32"] for each in times]))
        error = 100 * float((logits - exact).norm() / exact.norm())
        print(f"{title:<26}{right:>7.1f} %{path.stat().st_size / 1000:>7.0f} kB{ratio:>9.2f}{error:>7.1f} %")
    print("\nlatency: to BatchNorm in float32; error: of the logits, root mean square to those in float32\n")
    for title, path in paths.items():
        print(f"{title}: {', '.join(f'{count} {name}' for name, count in operators(path).items())}")


if __name__ == "__main__":
    main()
