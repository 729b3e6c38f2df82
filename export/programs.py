"""Programs of torch.export that torch.onnx need not trace a second time.

torch.onnx decomposes each program into operators that write to no tensor, by tracing it again: up to half of
the time of an export. In eval mode a convolution network has few operators that this would change, and for
each there is another with the same result.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.onnx.ops  # registers its operators
from torch import Tensor, fx
from torch.export import ExportedProgram

aten = torch.ops.aten

_IN_PLACE = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.elu_.default: aten.elu.default,
    aten.gelu_.default: aten.gelu.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.mish_.default: aten.mish.default,
    aten.relu_.default: aten.relu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.silu_.default: aten.silu.default,
    aten.tanh_.default: aten.tanh.default,
}
# Their results are tensors of their own, which share no memory.
_OWN_RESULT = {
    *_IN_PLACE.values(),
    aten.avg_pool2d.default,
    aten.cat.default,
    aten.clamp.default,
    aten.clone.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.div.Tensor,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.linear.default,
    aten.max_pool2d.default,
    aten.mean.dim,
    aten.rsqrt.default,
    aten.softplus.default,
    aten.sub.Tensor,
    torch.ops.onnx_symbolic._symbolic.default,
}
_VIEWS = {
    aten.permute.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}
_UNCHANGED = _OWN_RESULT | _VIEWS | {aten.pad.default, aten.sym_size.int, operator.getitem}

Edit = Callable[[], object]


class PlainProgram(ExportedProgram):
    """A program that replaces its operators one by one where that is enough, else is traced again."""

    @classmethod
    def of(cls, program: ExportedProgram) -> "PlainProgram":
        """A program with the graph of `program`, which cannot be used afterwards."""
        return cls(
            root=program.graph_module,
            graph=program.graph,
            graph_signature=program.graph_signature,
            state_dict=program.state_dict,
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=program.verifiers,
        )

    def run_decompositions(
        self, decomp_table: Mapping[Any, Callable[..., Any]] | None = None, *args: Any, **options: Any
    ) -> ExportedProgram:
        """This program, if what `decomp_table` would change in it can be replaced; else as of any program."""
        if decomp_table is not None and not any(target in decomp_table for target in _UNCHANGED):
            _write_to_nothing(self.graph)
            edits = [_edit(node) for node in self.graph.nodes]
            if None not in edits:  # otherwise none is made: they depend on there being no writes at all
                for edit in filter(None, edits):
                    edit()
                self.graph_module.recompile()
                return self
        decomposed: ExportedProgram = super().run_decompositions(decomp_table, *args, **options)
        return decomposed


def _write_to_nothing(graph: fx.Graph) -> None:
    """Lets operators of `graph` give a new value instead of writing to one that nothing else reads."""
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:  # torch.onnx removes it, too
            graph.erase_node(node)
    for node in graph.nodes:
        if node.target in _IN_PLACE and _is_last_use(node.args[0], node):
            node.target = _IN_PLACE[node.target]


def _is_last_use(source: Any, node: fx.Node) -> bool:
    """Whether nothing but `node` sees what is written to `source`."""
    if [*source.users] != [node]:
        return False
    return source.target in _OWN_RESULT or (_has_no_effect(source) and _is_last_use(source.args[0], source))


def _has_no_effect(node: fx.Node) -> bool:
    """Whether the result of `node` is its first operand."""
    if node.target in (aten.dropout.default, aten.dropout_.default):
        return node.args[2] is False
    if node.target is aten.contiguous.default:
        return _value(node.args[0]).is_contiguous() and not node.kwargs
    same_dtype = node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs
    return same_dtype and _value(node.args[0]).dtype == node.args[1]


def _edit(node: fx.Node) -> Edit | None:
    """What makes `node` an operator that torch.onnx leaves alone, in a graph without writes, if anything."""
    if node.op != "call_function":
        return _nothing if node.op in ("placeholder", "output") else None
    if _has_no_effect(node):
        is_output = any(user.op == "output" for user in node.users)  # its name is part of the program
        return None if is_output else functools.partial(_remove, node)
    if node.target in _REPLACED:
        return _REPLACED[node.target](node)
    return _nothing if node.target in _UNCHANGED else None


def _nothing() -> None:
    pass


def _remove(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def _become(node: fx.Node, target: Any, *options: Any, **kwargs: Any) -> Edit:
    """Calls `target` with the first operand, whichever that is when the others are edited, and `options`."""

    def edit() -> None:
        node.target, node.args, node.kwargs = target, (node.args[0], *options), kwargs

    return edit


def _copy(node: fx.Node) -> Edit | None:
    """``contiguous(x)`` of an x that is not."""
    if node.kwargs:
        return None
    return _become(node, aten.clone.default, memory_format=torch.contiguous_format)


def _view(node: fx.Node) -> Edit | None:
    """``reshape(x, sizes)``, if it copies nothing."""
    return _become(node, aten.view.default, *node.args[1:]) if _value(node.args[0]).is_contiguous() else None


def _mean(node: fx.Node) -> Edit | None:
    """Adaptive pooling to one pixel, as torch computes it."""
    pixels: Any = node.args[1]
    return _become(node, aten.mean.dim, [-1, -2], True) if [*pixels] == [1, 1] else None


def _split(node: fx.Node) -> Edit | None:
    """``chunk(x, count, dim)``, if the length of that axis is known."""
    operands: list[Any] = [*node.args, 0]
    source, count, dim = operands[:3]
    length = _value(source).shape[dim]
    if not isinstance(length, int) or not length:
        return None
    return _become(node, aten.split.Tensor, -(-length // count), dim)


def _flat_view(node: fx.Node) -> Edit | None:
    """``flatten(x, 1)``, if all sizes but the first are known, and it copies nothing."""
    before, after = _value(node.args[0]), _value(node).shape
    if not before.is_contiguous() or len(after) != 2 or not isinstance(after[1], int):
        return None
    if before.shape[0] != after[0]:
        return None

    def edit() -> None:
        rows: Any = after[0]
        if not isinstance(rows, int):
            with node.graph.inserting_before(node):
                rows = node.graph.call_function(aten.sym_size.int, (node.args[0], 0))
            rows.meta |= {**node.meta, "val": after[0]}
        _become(node, aten.view.default, [rows, after[1]])()

    return edit


_REPLACED: dict[Any, Callable[[fx.Node], Edit | None]] = {
    aten.adaptive_avg_pool2d.default: _mean,
    aten.chunk.default: _split,
    aten.contiguous.default: _copy,
    aten.flatten.using_ints: _flat_view,
    aten.reshape.default: _view,
}


def _value(node: Any) -> Tensor:
    """The fake tensor that `node` gives."""
    value: Tensor = node.meta["val"]
    return value
