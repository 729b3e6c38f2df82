"""A graph in the layout in which onnxruntime runs convolutions on a CPU, normalizers included.

onnxruntime's own optimization moves convolutions, pooling and what lies between them into the domain
com.microsoft.nchwc: [N, C, H, W] is held as [N, C / B, H, W, B] with blocks of B channels, 16 with AVX-512
and 8 with AVX2. Each normalizer has it reorder memory to the plain layout and back. But the mean and the
variance of a group do not depend on the order of its elements, and a group of whole blocks is one run of
memory in both layouts: there the normalizer works on the blocked memory as it is.
"""

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from onnx.helper import make_node, make_opsetid
from onnx_ir.convenience import replace_all_uses_with
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from pn_compiler.base.errors import ExportError, first_line
from pn_compiler.export.rewrites.rules import contents, is_constant, sizes
from pn_compiler.export.sessions import make_session, session_options

DOMAIN = "com.microsoft.nchwc"
_STATISTICS = {"InstanceNormalization", "ReduceMean", "Sub", "Mul", "Add", "Sqrt", "Reciprocal", "Div"}
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
    entries = []
    for reorder in [node for node in result.graph if node.op_type == "ReorderOutput"]:
        normalizer = _normalizer_behind(reorder)
        if normalizer is None or reorder.attributes["channels"].as_int() // normalizer.groups % block:
            continue
        normalizer.entry.replace_input_with(0, reorder.inputs[0])
        for value in normalizer.blocked:
            replace_all_uses_with(value, normalizer.exit)
        entries.append(normalizer.entry)
    if not entries:
        raise ExportError("no normalizer can run in the blocked layout: use target portable")
    _guard(result.graph, entries, block)
    RemoveUnusedNodesPass()(result)
    RemoveUnusedOpsetsPass()(result)
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    proto = onnx_ir.to_proto(result)
    del proto.graph.value_info[:]  # of the plain layout
    return proto, len(entries)


@dataclasses.dataclass(frozen=True, slots=True)
class _Normalizer:
    """The part of a graph from the Reshape of a normalizer to the one that restores the shape.

    Attributes:
        entry: the first Reshape.
        exit: what the last one gives.
        groups: of the normalizer.
        blocked: the same as `exit`, reordered to the blocked layout.
    """

    entry: onnx_ir.Node
    exit: onnx_ir.Value
    groups: int
    blocked: tuple[onnx_ir.Value, ...]


def _normalizer_behind(reorder: onnx_ir.Node) -> _Normalizer | None:
    """That which alone reads what `reorder` gives, and is only read in the blocked layout itself."""
    entry = _only_reader(reorder.outputs[0])
    if entry is None or entry.op_type != "Reshape":
        return None
    inner = dict.fromkeys(_until_reshape(entry))
    exits = [node for node in inner if node.op_type == "Reshape"]
    shape = _constant_input(entry, 1)
    if shape is None or len(shape) < 3 or len(exits) != 1 or not _keeps_batch(shape, reorder.outputs[0]):
        return None
    (last,) = exits
    restored = _constant_input(last, 1)
    if restored is None or list(restored)[1:] != sizes(reorder.outputs[0])[1:]:
        return None
    del inner[last]
    inside = {entry.outputs[0], *(node.outputs[0] for node in inner)}
    if not all(_ignores_order(node, inside, len(shape)) for node in inner):
        return None
    result = last.outputs[0]
    readers = [node for node, _ in result.uses()]
    if result.is_graph_output() or any(node.op_type != "ReorderInput" for node in readers):
        return None
    return _Normalizer(entry, result, int(shape[1]), tuple(node.outputs[0] for node in readers))


def _keeps_batch(shape: np.ndarray[Any, Any], value: onnx_ir.Value) -> bool:
    """Whether a Reshape of `value` to `shape` leaves its first axis as it is: 0, or what remains."""
    rest = math.prod(sizes(value)[1:])
    return bool(shape[0] == 0 or (shape[0] == -1 and rest > 0 and math.prod(shape[1:].tolist()) == rest))


def _only_reader(value: onnx_ir.Value) -> onnx_ir.Node | None:
    """The node that reads a value, if it is one, and the value is no output of the graph."""
    readers = [node for node, _ in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _constant_input(node: onnx_ir.Node, index: int) -> np.ndarray[Any, Any] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or not is_constant(value) else contents(value)


def _until_reshape(node: onnx_ir.Node) -> Iterator[onnx_ir.Node]:
    """The nodes that depend on `node`, up to the next Reshape of each path; some may come twice."""
    for reader, _ in node.outputs[0].uses():
        yield reader
        if reader.op_type in _STATISTICS:
            yield from _until_reshape(reader)


def _ignores_order(node: onnx_ir.Node, inside: Set[onnx_ir.Value], dims: int) -> bool:
    """Whether `node` treats all elements of a group alike, [N, G, L] or [N, G, C / G, S].

    Args:
        inside: the values that are computed of the group.
        dims: 3 or 4, of the two.
    """
    if node.op_type == "InstanceNormalization":
        return dims == 3
    if node.op_type == "ReduceMean":
        axes, source = _constant_input(node, 1), node.inputs[0]
        if axes is None or len(axes) != 1 or source is None:
            return False
        if dims == 3 or axes[0] == 2:  # the mean of a group, of all its elements or of its channels
            maker = source.producer()
            of_channels = maker is not None and maker.op_type == "ReduceMean"
            return bool(axes[0] == 2) and (dims == 3 or of_channels)
        reader = _only_reader(node.outputs[0])  # means of channels are for nothing else
        return bool(axes[0] == 3) and reader is not None and reader.op_type == "ReduceMean"
    places = [place for place, value in enumerate(node.inputs) if value not in inside]
    constants = [_constant_input(node, place) for place in places]
    alike = all(c is not None and (c.size == 1 or (dims == 4 and c.shape[-2:] == (1, 1))) for c in constants)
    return node.op_type in _STATISTICS and alike  # constants of all elements, or of all of a group


def _optimized(model: onnx.ModelProto) -> onnx_ir.Model:
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
        return onnx_ir.from_proto(onnx.load(path))


def _guard(graph: onnx_ir.Graph, entries: list[onnx_ir.Node], block: int) -> None:
    """Makes the shape of each of `entries` depend on nodes that fail where blocks have another size.

    Four channels are reordered to a block, which is reshaped to `block` values, zeros whose largest is added
    to each shape. The name of the node that fails is the message.
    """
    message = (
        f"this file is for onnxruntime with blocks of {block} channels: compile it again on this machine"
    )
    tape = onnx_ir.tape.Tape(graph)
    probe, expected, axis = (
        tape.initializer(onnx_ir.tensor(values), f"block_size_{name}")
        for name, values in {
            "probe": np.zeros((1, _PROBED, 1, 1), np.float32),
            "expected": np.array([block]),
            "axis": np.array([0]),
        }.items()
    )
    reordered = tape.op("ReorderInput", [probe], {"channels_last": 0}, domain=DOMAIN)
    largest = tape.op("ReduceMax", [tape.op("Reshape", [reordered, expected], name=message), axis])
    zero = tape.op("Cast", [largest], {"to": onnx.TensorProto.INT64})
    checked = {shape: tape.op("Add", [shape, zero]) for shape in {entry.inputs[1]: None for entry in entries}}
    for entry in entries:
        entry.replace_input_with(1, checked[entry.inputs[1]])
    graph.sort()  # the new nodes are at its end
