"""How many dimensions each tensor of a graph has, as far as the operators and example inputs tell.

A Linear mixes channels only if its input is [N, C]; a pool over 3 axes pools over channels if its input is
[N, C, H, W], which it takes for one sample; a normalizer erases its input if a group holds one value. All
ask for ranks, not shapes, so no example input is needed for most networks. What is not known is None.
"""

import logging
import math
import operator
import re
from typing import Any

import torch
from torch import fx, nn

from pn_compiler.graph.graph_utils import called_module
from pn_compiler.inspection.captured import copy_with_functions
from pn_compiler.inspection.module_state import ModuleState
from pn_compiler.nn import ChannelAffine, ConstantAffine, ConstantClamp, ProxyNormAct
from pn_compiler.operators.activations import activation_of, is_activation
from pn_compiler.operators.op_names import listed_sizes, operands, operator_name, reads_shape, reduced_dims
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.random_states import RandomStates

logger = logging.getLogger(__name__)

_KEY = "pn_compiler.rank"  # of node.meta
_BATCH = "pn_compiler.batch"
_PIXELS = "pn_compiler.pixels"
_SHAPE = "pn_compiler.shape"
_DTYPE = "pn_compiler.dtype"

_BROADCASTS = frozenset(
    [
        "add",
        "div",
        "iadd",
        "imul",
        "isub",
        "itruediv",
        "maximum",
        "minimum",
        "mul",
        "multiply",
        "sub",
        "truediv",
    ]
)
_POOLS = frozenset(
    f"{kind}pool{n}d" for kind in ("max_", "avg_", "adaptive_avg_", "adaptive_max_") for n in (1, 2, 3)
)
_CONVS = frozenset(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))
_KEEPS_RANK = frozenset(
    [
        "alpha_dropout", "batch_norm", "chunk", "clone", "contiguous", "detach", "double", "dropout",
        "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "flip", "float", "group_norm", "half",
        "index_select", "instance_norm", "interpolate", "layer_norm", "linear", "log_softmax", "movedim",
        "moveaxis", "narrow", "neg", "pad", "permute", "pixel_shuffle", "pixel_unshuffle", "roll",
        "softmax", "split", "split_with_sizes", "swapaxes", "swapdims", "tensor_split", "to", "transpose",
        "type_as",
    ]
)  # fmt: skip
_PIECES = frozenset(["chunk", "split", "split_with_sizes", "tensor_split"])
_KEEPS_RANK_MODULES = (
    nn.Linear,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Identity,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.Softmax,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
    ChannelAffine,
    ConstantAffine,
    ConstantClamp,
    ProxyNormAct,
)
_KEEPS_BATCH = _BROADCASTS | _POOLS | {"contiguous", "dropout", "interpolate", "pad"}


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
            node.meta[_PIXELS] = math.prod(result.shape[2:])
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
    known: int | None = node.meta.get(_PIXELS)
    return known


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


def spatial_dims(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """n of an operator over n axes behind [N, C], such as max_pool2d and nn.Conv2d; None if it is no such."""
    module = called_module(gm, node)
    names = [operator_name(node)] if module is None else [cls.__name__ for cls in type(module).__mro__]
    found = (re.search(r"([123])d$", name) for name in names)
    return next((int(match[1]) for match in found if match), None)


def reads_batch(gm: fx.GraphModule, node: fx.Node, value: fx.Node) -> bool:
    """Whether `node`, over n axes, certainly takes `value` for [N, C, *] and not for one sample [C, *]."""
    dims, known = spatial_dims(gm, node), rank(value)
    return dims is not None and known == dims + 2


def _keeps_batch(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the first axis of `node` is that of its inputs, which is that of the inputs of the graph."""
    if node.op in ("placeholder", "get_attr"):
        return True
    module, name, known = called_module(gm, node), operator_name(node), rank(node)
    if module is not None:
        layer = isinstance(module, (nn.modules.conv._ConvNd, *_KEEPS_RANK_MODULES)) or is_activation(module)
        keeps = layer and known != (spatial_dims(gm, node) or 0) + 1
    elif node.target is operator.getitem:
        keeps = isinstance(called_module(gm, node.all_input_nodes[0]), ProxyNormAct)
    elif name in ("cat", "concat", "concatenate"):
        keeps = operands(node, "dim").get("dim") == 1
    else:
        keeps = name in _KEEPS_BATCH or name in _CONVS or activation_of(node) is not None
    return keeps and all(has_batch_of_inputs(source) for source in node.all_input_nodes)


def _rank_of(gm: fx.GraphModule, node: fx.Node) -> int | None:
    if node.op == "get_attr":
        return _rank_of_attribute(gm, str(node.target))
    if node.op not in ("call_module", "call_function", "call_method"):
        return None
    module = called_module(gm, node)
    if module is not None:
        return _rank_of_module(gm, node, module)
    if reads_shape(node):
        return 0
    if node.target is operator.getitem:
        return _rank_of_item(gm, node)
    first = rank(node.all_input_nodes[0]) if node.all_input_nodes else None
    name = operator_name(node)
    plain = name.removesuffix("_")
    of_python = getattr(operator, name, None) is node.target and "matmul" not in name
    if plain in _BROADCASTS or of_python:
        ranks = [rank(source) for source in node.all_input_nodes]
        return None if None in ranks else max((known or 0 for known in ranks), default=None)
    if name in _CONVS:
        return first or int(name[-2]) + 2
    if plain in _KEEPS_RANK or name in _POOLS or activation_of(node) is not None:
        return first
    return _rank_of_shaping(node, name, first)


def _rank_of_shaping(node: fx.Node, name: str, first: int | None) -> int | None:
    """The rank behind an operator that may change it; `first` is that of its first input."""
    if name in ("cat", "concat", "concatenate"):  # all have one rank
        return next((known for source in node.all_input_nodes if (known := rank(source))), None)
    if name in ("view", "reshape", "expand"):
        sizes = listed_sizes(node)
        return None if sizes is None else len(sizes)
    if name in ("view_as", "reshape_as", "expand_as"):
        return rank(node.all_input_nodes[-1])
    if name == "flatten":
        given = operands(node, "start_dim", "end_dim")
        return _rank_flattened(first, given.get("start_dim", 0), given.get("end_dim", -1))
    if first is None:
        return None
    if name in ("unsqueeze", "select"):
        return first + 1 if name == "unsqueeze" else first - 1
    dims = reduced_dims(node)
    if dims is None:
        return None
    return first if dims[1] else first - len(dims[0])


def _rank_of_attribute(gm: fx.GraphModule, path: str) -> int | None:
    owner, _, name = path.rpartition(".")
    value = getattr(gm.get_submodule(owner), name, None)
    return value.dim() if isinstance(value, torch.Tensor) else None


def _rank_of_item(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """The rank of ``x[...]``, of a result of a site, or of a piece of a split."""
    source, index = node.all_input_nodes[0], node.args[1]
    before, site = rank(source), called_module(gm, source)
    if isinstance(site, ProxyNormAct) and len(site.outputs) > 1:
        vector = isinstance(index, int) and site.outputs[index] in ("scale", "shift")
        return 1 if vector else before
    if before in (None, 0) or operator_name(source) in _PIECES:
        return before
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or part is None or isinstance(part, slice | int) for part in parts):
        return None
    return before + sum(part is None for part in parts) - sum(isinstance(part, int) for part in parts)


def _rank_of_module(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> int | None:
    before = rank(node.all_input_nodes[0]) if node.all_input_nodes else None
    if isinstance(module, nn.Flatten):
        return _rank_flattened(before, module.start_dim, module.end_dim)
    if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        return 4 if isinstance(module, nn.BatchNorm2d) else 5  # they take nothing else
    if isinstance(module, nn.modules.conv._ConvNd):
        return before or len(module.kernel_size) + 2
    if not (isinstance(module, _KEEPS_RANK_MODULES) or is_activation(module)):
        return None
    if before is None and isinstance(module, nn.BatchNorm1d) and node.all_input_nodes:
        producer = called_module(gm, node.all_input_nodes[0])
        if isinstance(producer, nn.Linear) and producer.out_features == module.num_features:
            set_rank(node.all_input_nodes[0], 2)
            return 2
    return before


def flattens_module(module: nn.Module) -> bool:
    """Whether `module` makes [N, C * S] of [N, C, *]."""
    return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)


def flattens_channels(node: fx.Node) -> bool:
    """Whether a function or method node makes [N, C * S] of [N, C, *]."""
    name = operator_name(node)
    if name == "flatten":
        given = operands(node, "start_dim", "end_dim")
        return (given.get("start_dim"), given.get("end_dim", -1)) == (1, -1)
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
