"""Where the scale and shift of a site can go: the rules in tables, and the walk over the graph."""

import dataclasses
from collections import Counter

import torch
from torch import Tensor, fx, nn

from pn_compiler.graph.aliases import find_aliases
from pn_compiler.graph.graph_utils import called_module, module_calls, operator_of, traits_of
from pn_compiler.graph.ranks import flattens_channels, rank, reads_batch
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.nn import INPUT_AFFINE
from pn_compiler.numerics.affine import absorb_affine, absorb_output_affine
from pn_compiler.operators.op_names import operands, operator_name, reads_shape, reduced_dims


@dataclasses.dataclass(frozen=True, slots=True)
class Blocked:
    """An edge that the shift cannot cross: `user` needs the full value of `value`."""

    value: fx.Node
    user: fx.Node
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Where the affine of one site goes.

    Attributes:
        absorbers: linear operators that absorb it.
        blocked: edges where it must be applied instead.
    """

    absorbers: tuple[fx.Node, ...]
    blocked: tuple[Blocked, ...]


class Router:
    """Follows the value of a site to everything that reads it.

    Args:
        gm: with ranks inferred. Rewriting sites does not change what this notes of it.
        through_padding: whether zero padding stands before the affine (``proxy_padding="activation"``),
            so that a padded operator lets a shift pass.
    """

    def __init__(self, gm: fx.GraphModule, *, through_padding: bool) -> None:
        self.gm = gm
        self.through_padding = through_padding
        self.pinned = find_aliases(gm).pinned
        self.calls = module_calls(gm)
        parameters = Counter(id(p) for m in gm.modules() for p in m._parameters.values())
        self.tied = {key for key, count in parameters.items() if count > 1}
        paths = Counter(id(m) for _, m in gm.named_modules(remove_duplicate=False))
        self.aliased = {key for key, count in paths.items() if count > 1}
        reads = (str(node.target) for node in gm.graph.nodes if node.op == "get_attr")
        self.read = {read.rpartition(".")[0] for read in reads}

    def route(self, start: fx.Node, num_channels: int) -> Route:
        """Where the affine of `start`, [N, num_channels, *], goes."""
        absorbers: dict[fx.Node, None] = {}
        blocked: list[Blocked] = []
        values, seen = [start], {start}
        while values:
            value = values.pop()
            for user in value.users:
                if reads_shape(user):
                    continue
                if value in self.pinned:
                    blocked.append(Blocked(value, user, f"{value.name} is overwritten through another view"))
                    continue
                if commutes(self.gm, user, value, through_padding=self.through_padding):
                    if user not in seen:
                        seen.add(user)
                        values.append(user)
                    continue
                reason = self.refusal(user, value, num_channels)
                if reason is None:
                    absorbers[user] = None
                else:
                    blocked.append(Blocked(value, user, reason))
        return Route(tuple(absorbers), tuple(blocked))

    def refusal(self, user: fx.Node, value: fx.Node, num_channels: int) -> str | None:
        """Why `user` cannot absorb the affine of `value`; None if it can."""
        module = called_module(self.gm, user)
        if module is None:
            what = "the output of the model" if user.op == "output" else operator_name(user) or user.target
            return f"{what} reads it"
        where = f"{user.target} ({type(module).__name__})"
        absorbing = type(module) in INPUT_AFFINE or type(module) in INPUT_AFFINE.values()
        if not absorbing or user.args != (value,) or user.kwargs:
            return f"{where} reads it"
        if (fixed := self.fixed_weight(user)) is not None:
            return fixed
        if isinstance(module, nn.Linear):
            return _refusal_of_linear(module, where, rank(value), num_channels)
        assert isinstance(module, nn.modules.conv._ConvNd)
        if not self.through_padding and pads_with_zeros(module):
            return f"{where} pads its input with zeros"
        if rank(value) not in (len(module.kernel_size) + 2, None):
            return f"{where} takes an input of {rank(value)} axes for one sample"
        return None if module.in_channels == num_channels else f"{where} reads other channels"

    def fixed_weight(self, call: fx.Node) -> str | None:
        """Why the weight of the module that `call` calls cannot be changed for this call; None if it can."""
        path = str(call.target)
        module = self.gm.get_submodule(path)
        where = f"{path} ({type(module).__name__})"
        if len(self.calls[path]) > 1 or id(module) in self.aliased:
            return f"{where} is called from several places"
        computes = "weight" not in module._parameters or "forward" in vars(module)
        if computes or has_hooks(module):
            return f"{where} has hooks, or computes its weight before it runs"
        if path in self.read or any(id(p) in self.tied for p in module.parameters()):
            return f"{where} shares its weight with another module"
        return None


_PRODUCERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


@torch.no_grad()
def set_weight_and_bias(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a convolution or linear layer these values, rounded to the dtype of its weight."""
    assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    module.weight.copy_(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias.to(module.weight.dtype), module.weight.requires_grad)


@torch.no_grad()
def put_into(gm: fx.GraphModule, absorber: fx.Node, scale: Tensor, shift: Tensor) -> None:
    """Makes an absorber of a `Route` take x where it took x * scale + shift; both float64 [C]."""
    module = called_module(gm, absorber)
    assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    groups = getattr(module, "groups", 1)
    repeats = module.weight.shape[1] * groups // len(scale)  # above 1 behind a flatten
    scale, shift = (values.repeat_interleave(repeats) for values in (scale, shift))
    bias = None if module.bias is None else module.bias.double()
    set_weight_and_bias(module, *absorb_affine(module.weight.double(), bias, scale, shift, groups))


@torch.no_grad()
def put_before(gm: fx.GraphModule, call: fx.Node, scale: Tensor, shift: Tensor) -> bool:
    """Puts the affine of `call` into the operator it reads, if that is linear and has no other readers.

    Returns whether it did. scale and shift are float64 [C].
    """
    producer = call.all_input_nodes[0]
    module = called_module(gm, producer)
    if type(module) not in _PRODUCERS or not all(u is call or reads_shape(u) for u in producer.users):
        return False
    assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    if isinstance(module, nn.Linear) and rank(producer) != 2:  # its outputs are on the last axis
        return False
    if Router(gm, through_padding=False).fixed_weight(producer) is not None:
        return False
    weight, bias = absorb_output_affine(
        module.weight.double(), None if module.bias is None else module.bias.double(), scale, shift,
        groups=getattr(module, "groups", 1), transposed=getattr(module, "transposed", False),
    )  # fmt: skip
    set_weight_and_bias(module, weight, bias)
    return True


def _refusal_of_linear(module: nn.Linear, where: str, known: int | None, num_channels: int) -> str | None:
    if known is None:
        return f"{where} acts on the last axis of an input of unknown rank; pass example_inputs"
    if known != 2:
        return f"{where} acts on the last axis of {known}"
    return None if module.in_features % num_channels == 0 else f"{where} reads other channels"


def commutes(gm: fx.GraphModule, user: fx.Node, value: fx.Node, *, through_padding: bool) -> bool:
    """Whether the affine of `value` can be applied to the output of `user` instead."""
    if not user.args or user.args[0] is not value:
        return False
    module, traits = called_module(gm, user), traits_of(gm, user)
    if module is not None and has_hooks(module):
        return False
    if not traits.commutes:
        return flattens_channels(gm, user) or _averages_space(user, value)
    if not traits.axes:
        return True
    even = not operator_of(gm, user).startswith("avg_pool") or _averages_evenly(user, module, through_padding)
    return even and reads_batch(gm, user, value)


def gate_of(gm: fx.GraphModule, user: fx.Node, value: fx.Node) -> fx.Node | None:
    """The other factor, if `user` multiplies `value` by a gate of one pixel (squeeze-and-excitation)."""
    if operator_name(user) not in ("mul", "multiply") or len(user.args) != 2 or user.kwargs:
        return None
    other = user.args[1] if user.args[0] is value else user.args[0]
    if not isinstance(other, fx.Node) or other is value:
        return None
    node = other
    for _ in range(_LONGEST_GATE):
        if _pools_globally(gm, node):
            return other
        inputs = node.all_input_nodes
        if called_module(gm, node) is not None:
            inputs = inputs[:1]  # an absorber also reads a scale and a shift
        if len(inputs) != 1 or rank(node) not in (4, None):
            return None
        node = inputs[0]
    return None


_LONGEST_GATE = 12  # operators between the pool and the product


def _pools_globally(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = called_module(gm, node)
    if isinstance(module, nn.modules.pooling._AdaptiveAvgPoolNd):
        size = module.output_size
        return all(s == 1 for s in size) if isinstance(size, tuple) else size == 1
    if operator_name(node) == "adaptive_avg_pool2d":
        return operands(node, "output_size").get("output_size") in (1, (1, 1), [1, 1])
    reduced = reduced_dims(node)
    return reduced is not None and reduced[1] and set(reduced[0]) in ({2, 3}, {-1, -2})


_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def _averages_evenly(pool: fx.Node, module: nn.Module | None, through_padding: bool) -> bool:
    """Whether the weights of an average pool add up to 1, or do but for padding that does not count."""
    given = operands(pool, *_AVERAGE) if module is None else vars(module)
    padding = given.get("padding", 0)
    padded = any(padding) if isinstance(padding, list | tuple) else padding != 0
    plain = given.get("divisor_override") is None
    return plain and (through_padding or not padded or not given.get("count_include_pad", True))


def _averages_space(user: fx.Node, value: fx.Node) -> bool:
    """Whether `user` is a mean over all spatial dimensions, or over some and keeps them."""
    reduced, before = reduced_dims(user), rank(value)
    if reduced is None or before is None or before < 3:
        return False
    dims, keepdim = reduced
    return all(d % before >= 2 for d in dims) and (keepdim or len(dims) == before - 2)


def pads_with_zeros(conv: nn.modules.conv._ConvNd) -> bool:
    if conv.padding_mode != "zeros":
        return False  # reflect, replicate and circular padding repeat values, affine included
    padding = conv.padding
    if isinstance(padding, str):
        return padding == "same" and any(k > 1 for k in conv.kernel_size)
    return any(padding)
