"""A graph in the layout in which onnxruntime runs convolutions on a CPU, normalizers included.

onnxruntime's own optimization moves convolutions, pooling and what lies between them into the domain
com.microsoft.nchwc: [N, C, H, W] is held as [N, C / B, H, W, B] with blocks of B channels, 16 with AVX-512
and 8 with AVX2. Each normalizer has it reorder memory to the plain layout and back.

Here onnxruntime optimizes the graph with each normalizer taken out, so that only its weight and bias are
left: a depthwise 1x1 convolution, which stays in the blocked layout. The statistics come back afterwards, in
that layout, in one of two forms:

- For one image, two convolutions do it all, and share the threads. The sum of squares over a channel is a
  depthwise convolution of x whose kernel is x itself, of the size of the image: onnxruntime lays out both
  alike, and takes kernels that are computed. And the weight of the depthwise convolution behind is divided by
  the standard deviation. x is read twice, and written once.
- For any number of images, a normalizer of groups of whole blocks: a group is one run of memory in both
  layouts, and its statistics do not depend on the order of its elements.

A file for any batch runs the first form for one image after the other (`per_image`). Measured on mobilenet_v2
at 224x224 with one thread, relative to BatchNorm: 1.27 for the first form, 1.46 for the second; at batch 8
one image after the other takes 0.79 of the time of all together.
"""

import functools
import tempfile
from collections.abc import Callable, Set
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from onnx.helper import make_node, make_opsetid
from onnx_ir.convenience import replace_all_uses_with
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from pn_compiler.base.errors import ExportError, first_line
from pn_compiler.export.node_names import MESSAGE
from pn_compiler.export.rewrites.blocked_norms import DOMAIN, TakenOut, can_be_restored, restore
from pn_compiler.export.rewrites.norms import Norm, find_norms
from pn_compiler.export.rewrites.per_image import is_per_image, of_one_image, per_image
from pn_compiler.export.rewrites.rules import constant_input, sizes
from pn_compiler.export.sessions import make_session, session_options

_PROBED = 4  # channels, the fewest that ReorderInput takes
_FIRST_MARK = 2.0**20  # no weight of a network is a constant of such a size


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


def in_blocked_layout(model: onnx.ModelProto, *, one_image: bool = True) -> tuple[onnx.ModelProto, int]:
    """What onnxruntime makes of `model` on this machine, with the normalizers in the blocked layout, too.

    The result is for onnxruntime alone, and for machines with blocks of the same size. On another one
    onnxruntime refuses to load it, with an error whose text says so.

    Args:
        model: standard operators, weights inside; left untouched.
        one_image: whether the first form may be used, whose variance is E[x^2] - m^2 where a mean is
            subtracted; the second is more exact then.

    Returns:
        The model, and how many normalizers are in the blocked layout.

    Raises:
        ExportError: onnxruntime has no such layout here, or there is no normalizer that it can hold.
    """
    block, split = block_size(), one_image and is_per_image(model)
    result, places = _optimized_without_norms(
        of_one_image(model) if split else model, block, one_image=one_image
    )
    restored = [
        restore(result.graph, node, taken, block, one_image=one_image) for node, taken in places.items()
    ]
    entries = [entry for entry in restored if entry is not None]
    if not entries:
        raise ExportError(
            "no normalizer can run in the blocked layout, which takes images of a known size in one group, "
            f"or in groups of a multiple of {block} channels: use target portable"
        )
    _guard(result.graph, entries[0], block)
    RemoveUnusedNodesPass()(result)
    RemoveUnusedOpsetsPass()(result)
    NameFixPass()(result)  # onnxruntime calls its constants val_3 and the like, too
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    proto = onnx_ir.to_proto(result)
    del proto.graph.value_info[:]  # of the plain layout
    return (per_image(proto, model.graph) if split else proto), len(entries)


def _optimized_without_norms(
    model: onnx.ModelProto, block: int, *, one_image: bool
) -> tuple[onnx_ir.Model, dict[onnx_ir.Node, TakenOut]]:
    """The graph that onnxruntime runs, normalizers taken out, and the convolutions where they belong."""
    kept: set[str] = set()
    while True:
        given = onnx_ir.from_proto(model)
        fits = functools.partial(can_be_restored, block=block, one_image=one_image)
        taken = _take_out(given, fits, kept)
        result = _optimized(onnx_ir.to_proto(given))
        places = {node: taken[mark] for node in result.graph if (mark := _mark(node)) in taken}
        lost = {norm.name for norm in taken.values()} - {norm.name for norm in places.values()}
        if not lost:
            return result, places
        kept |= lost  # onnxruntime fused such a convolution with another operator


def _take_out(
    model: onnx_ir.Model, fits: Callable[[Norm, tuple[int, ...]], bool], kept: Set[str]
) -> dict[float, TakenOut]:
    """Takes normalizers of images out, and marks the depthwise convolutions that stay of them."""
    taken: dict[float, TakenOut] = {}
    tape = onnx_ir.tape.Tape(model.graph)
    for norm in list(find_norms(model.graph)):
        name, shape = norm.y.name or "", tuple(sizes(norm.x))
        if name in kept or norm.x.dtype != onnx_ir.DataType.FLOAT or not fits(norm, shape):
            continue
        mark = _FIRST_MARK + len(taken)
        conv = _depthwise_behind(norm) or _add_depthwise(tape, norm)
        kernel = constant_input(conv, 1)
        assert kernel is not None
        conv.replace_input_with(0, norm.x)
        marks = onnx_ir.tensor(np.full_like(kernel, mark))
        conv.replace_input_with(1, tape.initializer(marks, f"{name}_mark"))
        taken[mark] = TakenOut(name, norm, shape, kernel.reshape(-1))
    model.graph.sort()
    RemoveUnusedNodesPass()(model)
    return taken


def _mark(conv: onnx_ir.Node) -> float:
    """What a depthwise 1x1 convolution was marked with; 0 if it was not."""
    kernel = constant_input(conv, 1) if conv.op_type in ("Conv", "FusedConv") else None
    if kernel is None or kernel.shape[1:] != (1, 1, 1) or kernel[0] < _FIRST_MARK:
        return 0.0
    return float(kernel.flat[0]) if (kernel[kernel != 0] == kernel[0]).all() else 0.0


def _depthwise_behind(norm: Norm) -> onnx_ir.Node | None:
    """The depthwise 1x1 convolution with bias that alone reads what `norm` gives."""
    readers = [node for node, _ in norm.y.uses()]
    if len(readers) != 1 or readers[0].op_type != "Conv" or norm.y.is_graph_output():
        return None
    (conv,) = readers
    kernel, bias = constant_input(conv, 1), constant_input(conv, 2)
    plain = not any(name in conv.attributes for name in ("pads", "strides", "auto_pad"))
    fits = kernel is not None and kernel.shape == (norm.channels, 1, 1, 1) and bias is not None
    return conv if fits and plain else None


def _add_depthwise(tape: onnx_ir.tape.Tape, norm: Norm) -> onnx_ir.Node:
    """One with weight 1 and bias 0, for all that read what `norm` gives."""
    ones, zeros = np.ones((norm.channels, 1, 1, 1), np.float32), np.zeros(norm.channels, np.float32)
    inputs = [
        norm.y,
        tape.initializer(onnx_ir.tensor(ones), f"{norm.y.name}_ones"),
        tape.initializer(onnx_ir.tensor(zeros), f"{norm.y.name}_zeros"),
    ]
    uses, is_output = list(norm.y.uses()), norm.y.is_graph_output()
    result = onnx_ir.Value(name=f"{norm.y.name}/affine")
    tape.op("Conv", inputs, {"group": norm.channels, "kernel_shape": [1, 1]}, output=result)
    result.shape, result.type = norm.y.shape, norm.y.type
    for node, index in uses:
        node.replace_input_with(index, result)
    if is_output:
        replace_all_uses_with(norm.y, result, replace_graph_outputs=True)
    conv = result.producer()
    assert conv is not None
    return conv


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
        result = onnx_ir.from_proto(onnx.load(path))
    _name_as_before(result.graph)
    return result


def _name_as_before(graph: onnx_ir.Graph) -> None:
    """Gives values in the blocked layout the names that they had, by which their module is known.

    onnxruntime calls a node after what it computes, with an ending.
    """
    taken = {value.name for node in graph for value in node.outputs}
    for node in graph:
        name = (node.name or "").removesuffix("_nchwc")
        if node.domain == DOMAIN and name != node.name and name not in taken:
            node.outputs[0].name = name


def _guard(graph: onnx_ir.Graph, entry: onnx_ir.Node, block: int) -> None:
    """Makes onnxruntime refuse to load the graph where blocks have another size.

    Four channels are reordered to one block, and compared with `block` values. onnxruntime infers shapes when
    it loads a file, whatever its optimization level, and those of ReorderInput with the block size of the
    machine: the comparison cannot be broadcast, and its name is the message. The result, a zero, is added to
    the shape of `entry`, a Reshape of the first normalizer, so that no tool finds it unused.
    """
    message = f"{MESSAGE}onnxruntime with blocks of {block} channels: compile it again on this machine"
    tape = onnx_ir.tape.Tape(graph)
    probe, expected = (
        tape.initializer(onnx_ir.tensor(np.zeros((1, channels, 1, 1), np.float32)), f"block_size_{name}")
        for name, channels in {"probe": _PROBED, "expected": block}.items()
    )
    reordered = tape.op("ReorderInput", [probe], {"channels_last": 0}, domain=DOMAIN)
    largest = tape.op("ReduceMax", [tape.op("Max", [reordered, expected], name=message)], {"keepdims": 0})
    zero = tape.op("Cast", [largest], {"to": onnx.TensorProto.INT64})
    entry.replace_input_with(1, tape.op("Add", [entry.inputs[1], zero]))
    graph.sort()  # the new nodes are at its end
