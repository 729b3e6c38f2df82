"""Whether a value of a graph is floating-point: activations of torch.nn do not accept integers or booleans.

It is known from example inputs or an exported program; otherwise it is derived from known operators.
"""

import operator

import torch
from torch import Tensor, fx, nn

from pn_compiler.graph.graph_utils import called_module
from pn_compiler.graph.ranks import dtype
from pn_compiler.operators.op_names import moves_values, operator_name, reads_shape

#: The result has the dtype of the first input.
_KEEPING = frozenset(
    [
        "abs", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
        "adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "amin", "avg_pool1d", "avg_pool2d",
        "avg_pool3d", "chunk", "clamp", "clamp_max", "clamp_min", "clip", "clone", "detach", "dropout",
        "expand", "expand_as", "flip", "hardtanh", "index_select", "interpolate", "masked_fill",
        "max_pool1d", "max_pool2d", "max_pool3d", "narrow", "neg", "pad", "pixel_shuffle", "pixel_unshuffle",
        "relu", "relu6", "repeat", "roll", "select", "split", "split_with_sizes", "square", "sum",
        "tensor_split", "threshold", "unbind",
    ]
)  # fmt: skip

#: One floating-point operand is enough.
_PROMOTING = frozenset(
    [
        "add", "cat", "concat", "concatenate", "iadd", "imul", "isub", "maximum", "minimum", "mul",
        "multiply", "pow", "rsub", "stack", "sub", "subtract",
    ]
)  # fmt: skip

#: The result is floating-point or complex for any input; or no other input is accepted.
_FLOATING = frozenset(
    [
        "batch_norm", "bfloat16", "celu", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
        "conv_transpose2d", "conv_transpose3d", "div", "divide", "double", "elu", "exp", "float", "gelu",
        "group_norm", "half", "hardsigmoid", "hardswish", "instance_norm", "itruediv", "layer_norm",
        "leaky_relu", "linear", "log_sigmoid", "log_softmax", "logsigmoid", "mean", "mish", "rsqrt", "selu",
        "sigmoid", "silu", "softmax", "softplus", "softsign", "sqrt", "tanh", "tanhshrink", "true_divide",
        "truediv",
    ]
)  # fmt: skip


def is_floating(gm: fx.GraphModule, node: fx.Node) -> bool | None:
    """Whether the tensor of `node` is floating-point; None if that is not known."""
    value = node.meta.get("val")  # of an exported program
    known = value.dtype if isinstance(value, Tensor) else dtype(node)
    if known is not None:
        return known.is_floating_point
    return True if _is_certain(gm, node) else None


def _is_certain(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the operators that compute `node` guarantee that it is floating-point."""
    seen, remaining = set(), [node]
    while remaining:  # any of these is enough
        current = remaining.pop()
        if current in seen:
            continue
        seen.add(current)
        sources = _sources(gm, current)
        if sources is None:
            return True
        remaining += sources
    return False


def _sources(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node] | None:
    """The inputs of `node` of which one must be floating-point for `node` to be; None if it always is."""
    first = node.all_input_nodes[:1]
    module = called_module(gm, node)
    if module is not None:
        return _sources_of_module(module, first)
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(gm.get_submodule(owner), name, None)
        return None if isinstance(value, Tensor) and value.is_floating_point() and value.dim() else []
    casts = any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
    if node.op not in ("call_function", "call_method") or casts or reads_shape(node):
        return []
    name = operator_name(node).removesuffix("_")
    if name in _FLOATING and "rounding_mode" not in node.kwargs:
        return None
    if name in _PROMOTING:
        return node.all_input_nodes
    if name == "where":
        return node.all_input_nodes[1:]
    if node.target is operator.getitem:
        return [] if _gives_indices(gm, first[0]) else first
    return first if moves_values(node, None) or name in _KEEPING else []


def _gives_indices(gm: fx.GraphModule, pool: fx.Node) -> bool:
    """Whether `pool` also returns the indices of its maxima."""
    of_module = getattr(called_module(gm, pool), "return_indices", False)
    return bool(of_module or pool.kwargs.get("return_indices") or "max_pool" in operator_name(pool))


def _sources_of_module(module: nn.Module, first: list[fx.Node]) -> list[fx.Node] | None:
    own = type(module).__module__
    if not own.startswith(("torch.nn.modules.", "pn_compiler.")):
        return []
    parameter = next(module.parameters(), None)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) or parameter is not None:
        return None if parameter is None or parameter.is_floating_point() else []
    return first
