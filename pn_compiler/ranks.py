"""How many dimensions each tensor of a graph has, as far as the operators and example inputs tell.

A Linear mixes channels only if its input is [N, C]; a normalizer erases its input if a group holds one
value. Both questions need ranks, not shapes, so no example input is needed for most networks.
"""

import logging
import math
import operator
from typing import Any

import torch
from torch import fx, nn

from pn_compiler.activations import activation_of, is_activation
from pn_compiler.captured import copy_with_functions
from pn_compiler.graph_utils import called_module
from pn_compiler.inputs import Inputs
from pn_compiler.module_state import ModuleState
from pn_compiler.nn import ChannelAffine, ConstantAffine, ConstantClamp, ProxyNormAct
from pn_compiler.spelling import flattens_channels, operands, operator_name, reduced_dims
from pn_compiler.trace_watch import RandomStates

logger = logging.getLogger(__name__)

_KEY = "pn_compiler.rank"  # of node.meta
_PIXELS = "pn_compiler.pixels"

_BY_DIMENSION = (
    "conv{}d",
    "conv_transpose{}d",
    "max_pool{}d",
    "avg_pool{}d",
    "adaptive_avg_pool{}d",
    "adaptive_max_pool{}d",
)
_FUNCTION_RANKS = {name.format(n): n + 2 for name in _BY_DIMENSION for n in (1, 2, 3)}
_MODULE_RANKS: dict[type[nn.Module], int] = {
    module: n + 2
    for n in (1, 2, 3)
    for module in (
        getattr(nn, f"Conv{n}d"),
        getattr(nn, f"ConvTranspose{n}d"),
        getattr(nn, f"MaxPool{n}d"),
        getattr(nn, f"AvgPool{n}d"),
        getattr(nn, f"AdaptiveAvgPool{n}d"),
        getattr(nn, f"AdaptiveMaxPool{n}d"),
    )
} | {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}  # BatchNorm1d takes [N, C] and [N, C, L]

_KEEPS_RANK = {
    *("add", "iadd", "sub", "mul", "imul", "cat", "linear", "dropout", "batch_norm"),
    *("contiguous", "permute", "transpose", "swapaxes", "swapdims"),
}
_KEEPS_RANK_MODULES = (
    nn.Linear,
    nn.GroupNorm,
    nn.Identity,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    ChannelAffine,
    ConstantAffine,
    ConstantClamp,
    ProxyNormAct,
)


def infer_ranks(graph: fx.GraphModule, inputs: Inputs | None = None) -> None:
    """Notes the rank of every tensor in ``node.meta``; unknown ones are noted as None.

    Args:
        graph: read, and its nodes' metadata written.
        inputs: example arguments; without them the ranks of the inputs are unknown, except that a
            BatchNorm1d right behind a Linear of as many features is taken to read [N, C].
    """
    remaining = list(inputs.of_graph(graph)) if inputs is not None else []
    for node in graph.graph.nodes:
        value = node.meta.get("val")  # an exported program knows its shapes
        if node.op == "placeholder" and remaining:
            value = remaining.pop(0)
        known = value.dim() if isinstance(value, torch.Tensor) else _rank_of(graph, node)
        set_rank(node, known)


class _Shapes(fx.Interpreter):
    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if not type(module).__module__.startswith(("torch.", "pn_compiler.")):
            module = copy_with_functions(module, {})  # user code, which may rewrite its weights
        return module(*args, **kwargs)

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, torch.Tensor):
            node.meta[_PIXELS] = math.prod(result.shape[2:])
        return result


def record_pixels(graph: fx.GraphModule, inputs: Inputs) -> None:
    """Runs `graph` once, in eval mode, to note how many values a channel has at each node.

    Modules that count, or draw, are left as they were.
    """
    state, states = ModuleState(graph), RandomStates()
    modes = {module: module.training for module in graph.modules()}
    graph.eval()
    try:
        with torch.no_grad():
            _Shapes(graph).run(*inputs.of_graph(graph), enable_io_processing=False)
    except Exception:  # the inputs are only examples: whoever runs the model on them will hear
        logger.info("the example inputs cannot be run", exc_info=True)
    finally:
        for module, training in modes.items():
            module.training = training
        state.restore()
        states.restore()


def pixels(node: fx.Node) -> int | None:
    """Number of values of one channel of one instance at `node`, or None if unknown."""
    known: int | None = node.meta.get(_PIXELS)
    return known


def rank(node: fx.Node) -> int | None:
    """Number of dimensions of `node`'s tensor, or None if unknown."""
    known: int | None = node.meta.get(_KEY)
    return known


def set_rank(node: fx.Node, known: int | None) -> None:
    node.meta[_KEY] = known


def _rank_of(graph: fx.GraphModule, node: fx.Node) -> int | None:
    module = called_module(graph, node)
    if module is not None:
        return _rank_of_module(graph, node, module)
    if flattens_channels(node):
        return 2
    if node.target is operator.getitem and isinstance(node.args[1], tuple):
        slices = all(part is Ellipsis or isinstance(part, slice) for part in node.args[1])
        return _rank_of_inputs(node) if slices else None
    name = operator_name(node)
    if name == "flatten":
        given = operands(node, "start_dim", "end_dim")
        return _rank_flattened(given.get("start_dim", 0), given.get("end_dim", -1))
    if name in _FUNCTION_RANKS:
        return _FUNCTION_RANKS[name]
    if name.removesuffix("_") in _KEEPS_RANK or activation_of(node) is not None:
        return _rank_of_inputs(node)
    dims = reduced_dims(node)
    before = _rank_of_inputs(node)
    if dims is None or before is None:
        return None
    return before if dims[1] else before - len(dims[0])


def _rank_of_module(graph: fx.GraphModule, node: fx.Node, module: nn.Module) -> int | None:
    if isinstance(module, nn.Flatten):
        return _rank_flattened(module.start_dim, module.end_dim)
    for cls, known in _MODULE_RANKS.items():
        if isinstance(module, cls):
            return known
    if not (isinstance(module, _KEEPS_RANK_MODULES) or is_activation(module)):
        return None
    before = _rank_of_inputs(node)
    if before is None and isinstance(module, nn.BatchNorm1d) and node.all_input_nodes:
        producer = called_module(graph, node.all_input_nodes[0])
        if isinstance(producer, nn.Linear) and producer.out_features == module.num_features:
            set_rank(node.all_input_nodes[0], 2)
            return 2
    return before


def flattens_module(module: nn.Module) -> bool:
    """Whether `module` makes [N, C * S] of [N, C, *]."""
    return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)


def _rank_flattened(start: Any, end: Any) -> int | None:
    return start + 1 if isinstance(start, int) and start >= 0 and end == -1 else None


def _rank_of_inputs(node: fx.Node) -> int | None:
    return max((known for n in node.all_input_nodes if (known := rank(n)) is not None), default=None)
