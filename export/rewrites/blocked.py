"""A graph in the layout in which onnxruntime runs convolutions on a CPU, normalizers included.

onnxruntime's own optimization moves convolutions, pooling and what lies between them into the domain
com.microsoft.nchwc: [N, C, H, W] is held as [N, C / B, H, W, B] with blocks of B channels, 16 with AVX-512
and 8 with AVX2. Each normalizer has it reorder memory to the plain layout and back. But the mean and the
variance of a group do not depend on the order of its elements, and a group of whole blocks is one run of
memory in both layouts: there the normalizer works on the blocked memory as it is.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Set
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx.helper import make_node, make_opsetid

from pn_compiler.base.errors import ExportError, first_line
from pn_compiler.export.rewrites.onnx_graph import GraphView, attribute, drop_unread, substitute
from pn_compiler.export.sessions import make_session, session_options

DOMAIN = "com.microsoft.nchwc"
_STATISTICS = {"InstanceNormalization", "ReduceMean", "Sub", "Mul", "Add", "Sqrt", "Div"}
_PROBED = 4  # channels, the fewest that ReorderInput takes


def block_size() -> int:
    """Channels in a block of onnxruntime on this machine.

    Raises:
        ExportError: onnxruntime has no such layout here.
    """
    graph = onnx.helper.make_graph(
        [make_node("ReorderInput", ["x"], ["y"], domain=DOMAIN, channels_last=0)], "probe",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, _PROBED, 1, 1))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )  # fmt: skip
    probe = onnx.helper.make_model(
        graph, opset_imports=[make_opsetid("", 18), make_opsetid(DOMAIN, 1)], ir_version=8
    )
    try:
        (y,) = make_session(probe.SerializeToString(), optimized=False, threads=1).run(
            None, {"x": np.zeros((1, _PROBED, 1, 1), np.float32)}
        )
    except Exception as error:  # whatever onnxruntime raises
        raise ExportError("onnxruntime has no blocked layout on this machine: use target portable") from error
    return int(y.shape[1])


def in_blocked_layout(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """What onnxruntime makes of `model` on this machine, with the normalizers in the blocked layout, too.

    The result is for onnxruntime alone, and for machines with blocks of the same size. On another one it
    stops with an error whose text says so when it is run.

    Args:
        model: standard operators, weights inside; left untouched.

    Returns:
        The model, and how many normalizers are in the blocked layout.

    Raises:
        ExportError: onnxruntime has no such layout here, or there is no normalizer that it can hold.
    """
    block = block_size()
    result = _optimized(model)
    graph = result.graph
    view = GraphView(graph)
    changed: dict[str, list[onnx.NodeProto]] = {}
    entries = []
    for reorder in [node for node in graph.node if node.op_type == "ReorderOutput"]:
        normalizer = _normalizer_behind(reorder, view)
        if normalizer is None or attribute(reorder, "channels") // normalizer.groups % block:
            continue
        normalizer.entry.input[0] = reorder.input[0]
        for name in normalizer.blocked:
            for reader in view.readers[name]:
                reader.input[:] = [normalizer.exit if source == name else source for source in reader.input]
            changed[name] = []
        changed[reorder.output[0]] = []
        entries.append(normalizer.entry)
    if not entries:
        raise ExportError("no normalizer can run in the blocked layout: use target portable")
    substitute(graph, changed)
    _guard(graph, entries, block)
    drop_unread(graph)
    del graph.value_info[:]
    used = {node.domain for node in graph.node}
    for entry in [entry for entry in result.opset_import if entry.domain not in used]:
        result.opset_import.remove(entry)
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    return result, len(entries)


@dataclasses.dataclass(frozen=True, slots=True)
class _Normalizer:
    """The part of a graph from the Reshape of a normalizer to the one that restores the shape.

    Attributes:
        entry: the first Reshape.
        exit: what the last one gives.
        groups: of the normalizer.
        blocked: the same as `exit`, reordered to the blocked layout.
    """

    entry: onnx.NodeProto
    exit: str
    groups: int
    blocked: tuple[str, ...]


def _normalizer_behind(reorder: onnx.NodeProto, view: GraphView) -> _Normalizer | None:
    """That which alone reads what `reorder` gives, and is only read in the blocked layout itself."""
    entry = view.only_reader(reorder.output[0])
    if entry is None or entry.op_type != "Reshape":
        return None
    inner = {node.output[0]: node for node in _until_reshape(entry, view)}
    exits = [node for node in inner.values() if node.op_type == "Reshape"]
    shape = view.values(entry.input[1])
    if shape is None or len(shape) < 3 or shape[0] != 0 or len(exits) != 1:
        return None
    (last,) = exits
    restored, sizes = view.values(last.input[1]), view.shapes.get(reorder.output[0])
    if restored is None or sizes is None or list(restored)[1:] != sizes[1:]:
        return None
    del inner[last.output[0]]
    if not all(
        _ignores_order(node, inner.keys() | {entry.output[0]}, len(shape), view) for node in inner.values()
    ):
        return None
    readers = view.readers.get(last.output[0], [])
    if last.output[0] in view.outputs or any(node.op_type != "ReorderInput" for node in readers):
        return None
    return _Normalizer(entry, last.output[0], int(shape[1]), tuple(node.output[0] for node in readers))


def _until_reshape(node: onnx.NodeProto, view: GraphView) -> Iterator[onnx.NodeProto]:
    """The nodes that depend on `node`, up to the next Reshape of each path; some may come twice."""
    for reader in view.readers.get(node.output[0], []):
        yield reader
        if reader.op_type in _STATISTICS:
            yield from _until_reshape(reader, view)


def _ignores_order(node: onnx.NodeProto, inside: Set[str], dims: int, view: GraphView) -> bool:
    """Whether `node` treats all elements of a group alike, [N, G, L] or [N, G, C / G, S].

    Args:
        inside: the values that are computed of the group.
        dims: 3 or 4, of the two.
    """
    if node.op_type == "InstanceNormalization":
        return dims == 3
    if node.op_type == "ReduceMean":
        axes = view.values(node.input[1]) if len(node.input) > 1 else None
        if axes is None or len(axes) != 1:
            return False
        if dims == 3 or axes[0] == 2:  # the mean of a group, of all its elements or of its channels
            return axes[0] == 2 and (dims == 3 or view.producers[node.input[0]].op_type == "ReduceMean")
        reader = view.only_reader(node.output[0])  # means of channels are for nothing else
        return axes[0] == 3 and reader is not None and reader.op_type == "ReduceMean"
    constants = [view.values(name) for name in node.input if name not in inside]
    return node.op_type in _STATISTICS and all(c is not None and c.size == 1 for c in constants)


def _optimized(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that onnxruntime runs on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "optimized.onnx")
        options = session_options(threads=1)
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # whatever onnxruntime raises
            raise ExportError(f"onnxruntime cannot load the model: {first_line(error)}") from error
        return onnx.load(path)


def _guard(graph: onnx.GraphProto, entries: list[onnx.NodeProto], block: int) -> None:
    """Makes the shape of each of `entries` depend on nodes that fail where blocks have another size.

    Four channels are reordered to a block, which is reshaped to `block` values, zeros whose largest is added
    to each shape. The name of the node that fails is the message.
    """
    message = (
        f"this file is for onnxruntime with blocks of {block} channels: compile it again on this machine"
    )
    constants = {
        "probe": np.zeros((1, _PROBED, 1, 1), np.float32),
        "expected": np.array([block]),
        "axis": np.array([0]),
    }
    names = {name: f"block_size_{name}" for name in (*constants, "block", "values", "largest", "zero")}
    graph.initializer.extend(onnx.numpy_helper.from_array(v, names[k]) for k, v in constants.items())
    nodes = [
        make_node("ReorderInput", [names["probe"]], [names["block"]], domain=DOMAIN, channels_last=0),
        make_node("Reshape", [names["block"], names["expected"]], [names["values"]], name=message),
        make_node("ReduceMax", [names["values"], names["axis"]], [names["largest"]]),
        make_node("Cast", [names["largest"]], [names["zero"]], to=onnx.TensorProto.INT64),
    ]
    shapes = sorted({entry.input[1] for entry in entries})
    nodes += [make_node("Add", [shape, names["zero"]], [f"{shape}_checked"]) for shape in shapes]
    for entry in entries:
        entry.input[1] = f"{entry.input[1]}_checked"
    first = graph.node[0]
    substitute(graph, {first.output[0]: [*nodes, first]})
