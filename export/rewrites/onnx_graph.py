"""Lookups in an ONNX graph, for those who rewrite it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx


class GraphView:
    """Who makes and who reads each value of a graph, as it was when this was made.

    Attributes:
        constants: initializers by name.
        producers: the node that makes a value.
        readers: the nodes that read a value; one that reads it twice is there twice.
        outputs: names of the outputs of the graph.
        shapes: of each value; sizes are -1 where unknown. Values of unknown rank are missing.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self.shapes = {
            value.name: [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
            for value in (*graph.value_info, *graph.input, *graph.output)
            if (kind := value.type.tensor_type).HasField("shape")
        }

    def values(self, name: str) -> np.ndarray[Any, Any] | None:
        """Those of an initializer; None if `name` is none."""
        tensor = self.constants.get(name)
        return None if tensor is None else onnx.numpy_helper.to_array(tensor)

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The node that reads a value, if it is one, and the value is no output of the graph."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


def substitute(graph: onnx.GraphProto, nodes: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Puts `nodes` in the place of the node whose first output has the name; no nodes remove it."""
    result = [new for node in graph.node for new in nodes.get(node.output[0], (node,))]
    del graph.node[:]
    graph.node.extend(result)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """Value of an attribute. Raises KeyError if the node does not state it."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    raise KeyError(name)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Removes initializers that nothing reads."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)
