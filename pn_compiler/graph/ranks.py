"""How many dimensions each tensor of a graph has, as far as the operators and example inputs tell.

A Linear mixes channels only if its input is [N, C]; a pool over 3 axes pools over channels if its input is
[N, C, H, W], which it takes for one sample; a normalizer erases its input if a group holds one value. All
ask for ranks, not shapes, so no example input is needed for most networks. What is not known is None.
"""

import logging
import math
import operator
from typing import Any

import torch
from torch import fx, nn

from pn_compiler.graph.graph_utils import attribute_of, called_module, operator_of, traits_of
from pn_compiler.inspection.captured import copy_with_functions
from pn_compiler.inspection.module_state import ModuleState
from pn_compiler.nn import ProxyNormAct
from pn_compiler.operators.op_names import (
    input_of,
    listed_sizes,
    operands,
    operator_name,
    reads_shape,
    reduced_dims,
)
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.random_states import RandomStates

logger = logging.getLogger(__name__)

_KEY = "pn_compiler.rank"  # of node.meta
_BATCH = "pn_compiler.batch"
_SHAPE = "pn_compiler.shape"
_DTYPE = "pn_compiler.dtype"


def infer_ranks(gm: fx.GraphModule, inputs: Inputs | None = None) -> None:
    """Notes the rank of every tensor in ``node.meta``; unknown ones are noted as None.

    Args:
        gm: read, and its nodes' metadata written.
        inputs: example arguments; without them the ranks of the inputs are unknown. The first convolution
            is then taken to read a batch, and a BatchNorm1d right behind a Linear of as many features [N, C].
    """
    remaining = list(inputs.of_graph(gm)) if inputs is not None else []
    for node in gm.graph.nodes:
        value = node.meta.get("val")  # an exported program knows its shapes
        if node.op == "placeholder" and remaining:
            value = remaining.pop(0)
        shape = value.shape if isinstance(value, torch.Tensor) else node.meta.get(_SHAPE)
        set_rank(node, _rank_of(gm, node) if shape is None else len(shape))
        node.meta[_BATCH] = _keeps_batch(gm, node)


class _Shapes(fx.Interpreter):
    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if not type(module).__module__.startswith(("torch.", "pn_compiler.")):
            module = copy_with_functions(module, {})  # user code, which may rewrite its weights
        return module(*args, **kwargs)

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, torch.Tensor):
            node.meta[_SHAPE] = tuple(result.shape)
            node.meta[_DTYPE] = result.dtype
        return result


def record_pixels(gm: fx.GraphModule, inputs: Inputs) -> None:
    """Runs `gm` once, in eval mode, to note how many values a channel has at each node, and its shape.

    Modules that count, or draw, are left as they were.
    """
    state, states = ModuleState(gm), RandomStates()
    modes = {module: module.training for module in gm.modules()}
    gm.eval()
    try:
        with torch.no_grad():
            own = inputs.map(torch.clone)  # the forward may write to them
            _Shapes(gm).run(*own.of_graph(gm), enable_io_processing=False)
    except Exception:  # the inputs are only examples: whoever runs the model on them will hear
        logger.info("the example inputs cannot be run", exc_info=True)
    finally:
        for module, training in modes.items():
            module.training = training
        state.restore()
        states.restore()


def pixels(node: fx.Node) -> int | None:
    """Number of values of one channel of one instance at `node`, or None if unknown."""
    shape = node.meta.get(_SHAPE)
    return None if shape is None else math.prod(shape[2:])


def dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype of `node`'s tensor in a run on the example inputs, or None if unknown."""
    known: torch.dtype | None = node.meta.get(_DTYPE)
    return known


def rank(node: fx.Node) -> int | None:
    """Number of dimensions of `node`'s tensor, or None if unknown; 0 for numbers, too."""
    known: int | None = node.meta.get(_KEY)
    return known


def set_rank(node: fx.Node, known: int | None) -> None:
    node.meta[_KEY] = known


def has_batch_of_inputs(node: fx.Node) -> bool:
    """Whether the first axis of `node` is certainly that of the inputs of the graph."""
    return bool(node.meta.get(_BATCH))


def reads_batch(gm: fx.GraphModule, node: fx.Node, value: fx.Node) -> bool:
    """Whether `node`, over n axes, certainly takes `value` for [N, C, *] and not for one sample [C, *]."""
    axes = traits_of(gm, node).axes
    return axes > 0 and rank(value) == axes + 2


def _keeps_batch(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the first axis of `node` is certainly that of the inputs of the graph."""
    if node.op == "placeholder":
        return True
    name, known, traits = operator_of(gm, node), rank(node), traits_of(gm, node)
    sources = node.all_input_nodes
    if traits.rank == "largest":
        return any(map(has_batch_of_inputs, sources)) and all(_fits_batch(gm, s, known) for s in sources)
    if name in ("cat", "concat", "concatenate"):
        tensors = [source for source in sources if source.op != "get_attr"]
        return operands(node, "dim").get("dim") == 1 and all(map(has_batch_of_inputs, tensors))
    value = input_of(node)
    if value is None or not has_batch_of_inputs(value):
        return False
    if node.target is operator.getitem:
        return isinstance(called_module(gm, value), ProxyNormAct)
    if name == "pad":
        amounts = operands(node, "pad").get("pad")
        return isinstance(amounts, list | tuple) and len(amounts) < 2 * (known or 0)
    return traits.batch and (reads_batch(gm, node, node) if traits.axes else known != 1)


def _fits_batch(gm: fx.GraphModule, operand: fx.Node, known: int | None) -> bool:
    """Whether a sum of `known` axes, with `operand` in it, has the first axis of another operand."""
    if has_batch_of_inputs(operand):
        return True
    value, before = attribute_of(gm, operand), rank(operand)
    single = value is not None and value.shape[:1] == (1,)
    return single or (known is not None and before is not None and before < known)


def _rank_of(gm: fx.GraphModule, node: fx.Node) -> int | None:
    if (attribute := attribute_of(gm, node)) is not None:
        return attribute.dim()
    if node.op not in ("call_module", "call_function", "call_method"):
        return None
    if reads_shape(node):
        return 0
    if node.target is operator.getitem:
        return _rank_of_item(gm, node)
    known = traits_of(gm, node).rank
    of_python = getattr(operator, operator_name(node), None) is node.target
    if known == "largest" or (of_python and "matmul" not in operator_name(node)):
        ranks = [rank(source) for source in node.all_input_nodes]
        return None if None in ranks else max((known or 0 for known in ranks), default=None)
    first = _rank_of_input(gm, node)
    return first if known == "first" else _rank_of_shaping(gm, node, first)


def _rank_of_input(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """The rank of the first input; a convolution without one is taken to read a batch."""
    module, traits = called_module(gm, node), traits_of(gm, node)
    value = input_of(node)
    before = None if value is None else rank(value)
    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        return 4 if isinstance(module, nn.BatchNorm2d) else 5  # they take nothing else
    if before is None and isinstance(module, nn.BatchNorm1d) and value is not None:
        producer = called_module(gm, value)
        if isinstance(producer, nn.Linear) and producer.out_features == module.num_features:
            set_rank(value, 2)
            return 2
    return before or (traits.axes + 2 if traits.axes and traits.dtype == "float" else before)


def _rank_of_shaping(gm: fx.GraphModule, node: fx.Node, first: int | None) -> int | None:
    """The rank behind an operator that may change it; `first` is that of its first input."""
    name = operator_of(gm, node)
    if name in ("cat", "concat", "concatenate"):  # all have one rank
        return next((known for source in node.all_input_nodes if (known := rank(source))), None)
    if name in ("view", "reshape", "expand"):
        sizes = listed_sizes(node)
        return None if sizes is None else len(sizes)
    if name in ("view_as", "reshape_as", "expand_as"):
        return rank(node.all_input_nodes[-1])
    if name == "flatten":
        return _rank_flattened(first, *flattened_axes(gm, node))
    if first is None or called_module(gm, node) is not None:
        return None
    if name in ("unsqueeze", "select"):
        return first + 1 if name == "unsqueeze" else first - 1
    dims = reduced_dims(node)
    if dims is None:
        return None
    return first if dims[1] else first - len(dims[0])


def _rank_of_item(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """The rank of ``x[...]``, of a result of a site, or of a piece of a split."""
    source, index = node.all_input_nodes[0], node.args[1]
    before, site = rank(source), called_module(gm, source)
    if isinstance(site, ProxyNormAct) and len(site.outputs) > 1:
        vector = isinstance(index, int) and site.outputs[index] in ("scale", "shift")
        return 1 if vector else before
    if before in (None, 0) or _gives_pieces(gm, source):
        return before
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or part is None or type(part) in (slice, int) for part in parts):
        return None
    return before + sum(part is None for part in parts) - sum(isinstance(part, int) for part in parts)


def _gives_pieces(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a list of tensors: the pieces of a split, or some of them."""
    if operator_of(gm, node) == "identity" or (
        node.target is operator.getitem and isinstance(node.args[1], slice)
    ):
        return _gives_pieces(gm, node.all_input_nodes[0])
    return traits_of(gm, node).pieces


def flattened_axes(gm: fx.GraphModule, node: fx.Node) -> tuple[Any, Any]:
    """The first and the last of the axes that `node`, a flatten, makes one of."""
    module = called_module(gm, node)
    if isinstance(module, nn.Flatten):
        return module.start_dim, module.end_dim
    given = operands(node, "start_dim", "end_dim")
    return given.get("start_dim", 0), given.get("end_dim", -1)


def flattens_channels(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` makes [N, C * S] of [N, C, *]."""
    name = operator_of(gm, node)
    if name == "flatten":
        return flattened_axes(gm, node) == (1, -1)
    sizes = listed_sizes(node) if name in ("view", "reshape") else None
    if sizes is None or len(sizes) != 2 or isinstance(sizes[1], fx.Node) or sizes[1] != -1:
        return False
    sized, value = size_of(sizes[0], 0), node.all_input_nodes[0]
    return sized is value or (sized is not None and has_batch_of_inputs(sized) and has_batch_of_inputs(value))


def size_of(size: Any, axis: int) -> fx.Node | None:
    """The tensor of which `size` is the size along `axis`, as x.size(0) and x.shape[0]; None if none."""
    if not isinstance(size, fx.Node):
        return None
    if operator_name(size) in ("size", "sym_size"):
        of = size.args[0] if operands(size, "dim").get("dim") == axis else None
        return of if isinstance(of, fx.Node) else None
    if size.target is not operator.getitem or size.args[1] != axis:
        return None
    sizes = size.args[0]
    if not isinstance(sizes, fx.Node) or len(sizes.all_input_nodes) != 1:
        return None
    whole = operator_name(sizes) == "size" and len(sizes.args) + len(sizes.kwargs) == 1
    shape = sizes.target is getattr and sizes.args[1] == "shape"
    return sizes.all_input_nodes[0] if whole or shape else None


def _rank_flattened(before: int | None, start: Any, end: Any) -> int | None:
    if not (isinstance(start, int) and isinstance(end, int)):
        return None
    if before is None:
        return start + 1 if start >= 0 and end == -1 else None
    return before - (end % before - start % before) if before else 1
