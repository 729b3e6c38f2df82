"""The normalizers of an ONNX graph, found in each of the forms in which they are written."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir.convenience import replace_all_uses_with
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pn_compiler.export.rewrites.rules import constant_input, contents, is_constant, sizes

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A normalizer without weight and bias, of `x` [N, C, *] to `y` of the same shape::

        y = (x - c) / sqrt(share E[(x - c)^2] + var)        E over [C / G, *] of one instance

    Attributes:
        x, y: its input and result.
        centered: whether c is the mean over the group, else 0.
        share, var: [G], in float64.
        two_stage: whether means are taken over each channel, then over its group.
    """

    x: onnx_ir.Value
    y: onnx_ir.Value
    centered: bool
    share: Array
    var: Array
    two_stage: bool

    @property
    def groups(self) -> int:
        return len(self.var)

    @property
    def channels(self) -> int:
        return sizes(self.x)[1]


def find_norms(graph: onnx_ir.Graph) -> Iterator[Norm]:
    """Those of known channels, each between a Reshape of [N, C, *] to groups and the one that undoes it."""
    for node in graph:
        if node.op_type != "Reshape" or len(sizes(node.outputs[0])) < 2:
            continue
        found = _instance_norm(node) or _means_and_products(node)
        if found is not None and _is_undone(found, node):
            yield found


def replace_norms(
    model: onnx_ir.Model,
    wanted: Callable[[Norm], bool],
    write: Callable[[onnx_ir.tape.Tape, Norm], onnx_ir.Value],
) -> int:
    """Replaces normalizers, in place.

    Args:
        model: its shapes must be known.
        wanted: which are replaced.
        write: computes the result of one in other operators, which it appends to the graph.

    Returns:
        How many were replaced.
    """
    norms = [norm for norm in find_norms(model.graph) if wanted(norm)]
    for norm in norms:
        y = write(onnx_ir.tape.Tape(model.graph), norm)
        y.shape, y.type = norm.y.shape, norm.y.type
        replace_all_uses_with(norm.y, y, replace_graph_outputs=True)
    if norms:
        model.graph.sort()
        RemoveUnusedNodesPass()(model)
    return len(norms)


def _instance_norm(back: onnx_ir.Node) -> Norm | None:
    """Reshape to [N, G, L], InstanceNormalization with weight 1 and bias 0, Reshape."""
    norm = _maker(back.inputs[0], "InstanceNormalization")
    entry = norm and _maker(norm.inputs[0], "Reshape")
    if norm is None or entry is None or entry.inputs[0] is None:
        return None
    weight, bias, flat = constant_input(norm, 1), constant_input(norm, 2), constant_input(entry, 1)
    if weight is None or bias is None or flat is None or (weight != 1).any() or bias.any():
        return None
    groups = len(weight)
    if flat.tolist() != [0, groups, -1]:
        return None
    epsilon = norm.attributes.get("epsilon")
    var = np.full(groups, 1e-5 if epsilon is None else epsilon.as_float())  # 1e-5 is ONNX's default
    return Norm(entry.inputs[0], back.outputs[0], True, np.ones(groups), var, two_stage=False)


def _means_and_products(back: onnx_ir.Node) -> Norm | None:
    """Reshape to [N, G, C / G, S], means over S, then C / G, with constants of [G, 1, 1], Reshape."""
    d, power = _quotient(back.inputs[0])
    var = None if power is None else _constant_of_sum(power)
    if d is None or var is None:
        return None
    mean, constant = var
    share, scaled = np.ones(1), _operands(mean, "Mul")
    if scaled is not None and scaled[1] is not None and is_constant(scaled[1]):
        share = contents(scaled[1])
    squares = _operands(_averaged(mean if scaled is None else scaled[0]), "Mul")
    if squares is None or squares[0] is not d or squares[1] is not d:
        return None
    difference = _operands(d, "Sub")
    grouped = d if difference is None else difference[0]
    if difference is not None and _averaged(difference[1]) is not grouped:
        return None
    entry = _maker(grouped, "Reshape")
    shape = None if entry is None else constant_input(entry, 1)
    if entry is None or entry.inputs[0] is None or shape is None or len(shape) != 4:
        return None
    if not _keeps_channels(shape, entry.inputs[0]):
        return None
    groups = int(shape[1])
    if not all(values.size == 1 or values.shape[-3:] == (groups, 1, 1) for values in (share, constant)):
        return None
    share, constant = (np.resize(values.astype(np.float64), groups) for values in (share, constant))
    return Norm(entry.inputs[0], back.outputs[0], difference is not None, share, constant, two_stage=True)


def _is_undone(norm: Norm, back: onnx_ir.Node) -> bool:
    """Whether `back` restores the shape of x, whose channels the groups share evenly."""
    shape, restored = sizes(norm.x), constant_input(back, 1)
    if len(shape) < 2 or -1 in shape[1:] or shape[1] % norm.groups or restored is None:
        return False
    return list(restored)[1:] == shape[1:]


def _keeps_channels(shape: Array, x: onnx_ir.Value) -> bool:
    """Whether a Reshape of `x` [N, C, *] to `shape`, [N, G, C / G, S], has whole channels of one instance."""
    batch, channels, *rest = [*sizes(x), -1, -1]
    size = math.prod(sizes(x)[2:])
    whole = shape[1] > 0 and shape[1] * shape[2] == channels and -1 not in rest[:-2]
    return whole and shape[0] in (0, -1, batch) and shape[3] in ((size,) if shape[0] == -1 else (-1, size))


def _quotient(value: onnx_ir.Value | None) -> tuple[onnx_ir.Value | None, onnx_ir.Value | None]:
    """(d, a) of d / sqrt(a), in whichever operators; (None, None) if it is no such quotient."""
    if (pair := _operands(value, "Div")) is not None:
        root = _maker(pair[1], "Sqrt")
    elif (pair := _operands(value, "Mul")) is not None:
        inverse = _maker(pair[1], "Reciprocal")
        root = None if inverse is None else _maker(inverse.inputs[0], "Sqrt")
    else:
        return None, None
    return (None, None) if root is None else (pair[0], root.inputs[0])


def _constant_of_sum(value: onnx_ir.Value) -> tuple[onnx_ir.Value, Array] | None:
    """The term and the constant that are added."""
    terms = _operands(value, "Add")
    if terms is None or terms[0] is None or terms[1] is None or not is_constant(terms[1]):
        return None
    return terms[0], contents(terms[1])


def _averaged(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """What `value` is the mean of, over the last axis of four, then the one before."""
    for axis in (2, 3):
        node = _maker(value, "ReduceMean")
        axes = None if node is None else constant_input(node, 1)
        if node is None or axes is None or axes.tolist() != [axis]:
            return None
        value = node.inputs[0]
    return value


def _operands(
    value: onnx_ir.Value | None, op_type: str
) -> tuple[onnx_ir.Value | None, onnx_ir.Value | None] | None:
    node = _maker(value, op_type)
    return None if node is None else (node.inputs[0], node.inputs[1])


def _maker(value: onnx_ir.Value | None, op_type: str) -> onnx_ir.Node | None:
    """The node that computes `value`, if it is of that type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None
