"""Time per operator of an ONNX file, by onnxruntime's own profiler."""

import collections
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from pn_compiler.base.tables import format_table

_LARGEST = 12  # nodes in the table
_SUFFIX = "_kernel_time"


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A node of the graph that onnxruntime runs, fused and moved into its own layouts.

    Attributes:
        name: as onnxruntime gives it.
        operator: its type, such as Conv, or ReorderInput for a change of layout.
        shape: of its first output.
        microseconds: of one run, the median.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    microseconds: float


def profile(content: bytes, images: np.ndarray[Any, Any], *, runs: int, warm_up: int) -> tuple[Node, ...]:
    """The nodes of a file in the order in which they run, on one thread.

    A run is somewhat slower than without the profiler, which takes about a microsecond a node.

    Args:
        content: of the ONNX file.
        images: the input.
        runs: that count.
        warm_up: runs before these.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: images}
        for _ in range(warm_up + runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _nodes(events, warm_up)


def _nodes(events: list[dict[str, Any]], warm_up: int) -> tuple[Node, ...]:
    """From the profiler's events, which hold each node once a run."""
    found: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            found[event["name"].removesuffix(_SUFFIX)].append(event)
    return tuple(
        Node(
            name,
            first["args"]["op_name"],
            _shape(first),
            statistics.median(e["dur"] for e in times[warm_up:]),
        )
        for name, times in found.items()
        for first in times[:1]
    )


def _shape(event: dict[str, Any]) -> tuple[int, ...]:
    outputs = event["args"].get("output_type_shape") or [{}]
    return tuple(next(iter(outputs[0].values()), ()))


def tables(nodes: tuple[Node, ...]) -> str:
    """Microseconds per run by operator, and the slowest nodes."""
    total = sum(node.microseconds for node in nodes)
    groups = collections.defaultdict(list)
    for node in nodes:
        groups[node.operator].append(node.microseconds)
    by_time = sorted(groups.items(), key=lambda item: -sum(item[1]))
    operators = [(name, str(len(t)), *_figures(sum(t), total)) for name, t in by_time]
    largest = [
        (n.name, n.operator, " x ".join(map(str, n.shape)), *_figures(n.microseconds, total))
        for n in sorted(nodes, key=lambda node: -node.microseconds)[:_LARGEST]
    ]
    operators.append(("all", str(len(nodes)), *_figures(total, total)))
    by_operator = format_table(("operator", "nodes", "us a run", "%"), operators)
    by_node = format_table(("node", "operator", "output", "us a run", "%"), largest)
    return f"{by_operator}\n\n{by_node}"


def _figures(microseconds: float, total: float) -> tuple[str, str]:
    return f"{microseconds:.0f}", f"{100 * microseconds / total:.1f}"
