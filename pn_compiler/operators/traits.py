"""The one table of what operators do to the axes, the channels and the dtype of what they read.

An operator has one row, as a function, as a method and as a layer: `operator_name` and `layer_name` give the
same name for ``F.max_pool2d(x, 2)`` and ``nn.MaxPool2d(2)``. What has no row is unknown, and so is a
forward that a user wrote. Activations have a table of their own, in `pn_compiler.operators.activations`.
"""

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import fx

from pn_compiler.operators.op_names import operator_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What is certain of an operator, on [N, C, *] with as many axes behind C as it works on.

    Attributes:
        rank: that of the first input, or the largest of those of all inputs; None if it depends.
        dtype: that of the first input; floating-point if any input is; floating-point in any case; or None.
        batch: whether the first axis of the result is that of the first input.
        channels: whether the second axis is as long as before.
        commutes: with a positive scale and a shift per channel, L(a r + v) = L(a) r + v. Max pooling pads
            with -inf; a dropout belongs here as padding does: what it drops is a, before the shift.
        resizes: whether it computes averages of values of one channel, with weights that add up to 1.
        moves: whether it rearranges its input and changes no value.
        drops: whether it multiplies each value by 0 or by one k > 0.
        pieces: whether it returns several tensors, which `rank` and `dtype` speak of.
        axes: n of an operator over n axes behind [N, C], which takes [C, *] for one sample; else 0.
    """

    rank: Literal["first", "largest"] | None = None
    dtype: Literal["first", "any", "float"] | None = None
    batch: bool = False
    channels: bool = False
    commutes: bool = False
    resizes: bool = False
    moves: bool = False
    drops: bool = False
    pieces: bool = False
    axes: int = 0


#: Of what keeps every axis and dtype, as activations do.
SAME = Traits(rank="first", dtype="first", batch=True, channels=True)
_UNKNOWN = Traits()
_FLOAT = dataclasses.replace(SAME, dtype="float")
_COMMUTING = dataclasses.replace(SAME, commutes=True)
_RESIZING = dataclasses.replace(SAME, resizes=True)
_LINEAR = Traits(rank="first", dtype="float", batch=True)
_MOVING = Traits(dtype="first", moves=True)

#: Names -> what these operators do; {n}, for 1, 2 and 3, is the number of axes behind [N, C].
_ROWS: dict[str, Traits] = {
    "identity contiguous": dataclasses.replace(_COMMUTING, moves=True),
    "dropout dropout1d dropout2d dropout3d feature_dropout": dataclasses.replace(_COMMUTING, drops=True),
    "alpha_dropout feature_alpha_dropout abs clone detach neg square": SAME,
    "max_pool{n}d avg_pool{n}d adaptive_avg_pool{n}d adaptive_max_pool{n}d": _COMMUTING,
    "max_pool{n}d_with_indices adaptive_max_pool{n}d_with_indices": Traits(rank="first", pieces=True),
    "reflection_pad{n}d replication_pad{n}d circular_pad{n}d": _RESIZING,
    "constant_pad{n}d zero_pad{n}d": SAME,
    "interpolate upsample upsampling_nearest2d upsampling_bilinear2d": _RESIZING,
    "conv{n}d conv_transpose{n}d input_affine_conv{n}d linear input_affine_linear": _LINEAR,
    "batch_norm group_norm layer_norm instance_norm instance_norm1d instance_norm2d instance_norm3d": _FLOAT,
    "anchored_norm channel_affine constant_affine constant_clamp folded_norm proxy_norm_act": _FLOAT,
    "bfloat16 double exp float half log_softmax rsqrt softmax sqrt": _FLOAT,
    "add iadd imul isub maximum minimum mul multiply pow rsub sub subtract": Traits(
        rank="largest", dtype="any"
    ),
    "div divide itruediv true_divide truediv": Traits(rank="largest", dtype="float"),
    "chunk split split_with_sizes tensor_split": Traits(rank="first", dtype="first", pieces=True),
    "dsplit hsplit unbind vsplit": Traits(dtype="first", pieces=True),
    "movedim moveaxis permute swapaxes swapdims t transpose": dataclasses.replace(_MOVING, rank="first"),
    "flatten reshape reshape_as squeeze unflatten unsqueeze view view_as": _MOVING,
    "pixel_shuffle pixel_unshuffle": dataclasses.replace(_MOVING, rank="first", batch=True, axes=2),
    "channel_shuffle": dataclasses.replace(SAME, moves=True),
    "flip index_select narrow pad roll": Traits(rank="first", dtype="first"),
    "to type_as": Traits(rank="first"),
    "cat concat concatenate stack": Traits(dtype="any"),
    "amax amin expand expand_as masked_fill repeat select sum": Traits(dtype="first"),
    "clamp clamp_max clamp_min clip hardtanh relu relu6 threshold": Traits(dtype="first"),
    "celu elu gelu hardsigmoid hardswish leaky_relu log_sigmoid logsigmoid mean mish selu": Traits(
        dtype="float"
    ),
    "sigmoid silu softplus softsign tanh tanhshrink": Traits(dtype="float"),
}

_TABLE: dict[str, Traits] = {
    template.format(n=n): dataclasses.replace(traits, axes=n if "{n}" in template else traits.axes)
    for names, traits in _ROWS.items()
    for template in names.split()
    for n in (1, 2, 3)
}


def traits_named(name: str) -> Traits:
    """What is known of the operator `name`."""
    return _TABLE.get(name, _UNKNOWN)


@functools.cache
def layer_name(cls: type) -> str:
    """The operator that layers of `cls` compute, as "max_pool2d"; "" for a forward that is in no row."""
    for base in cls.__mro__:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", base.__name__).lower()
        if name in _TABLE and base.__module__.startswith(("torch.nn.modules.", "pn_compiler.nn.")):
            return name if getattr(cls, "forward", None) is getattr(base, "forward", None) else ""
    return ""


def function_name(node: fx.Node) -> str:
    """`operator_name`; a max pool that returns the places of its maxima, too, is "..._with_indices"."""
    name = operator_name(node)
    if "max_pool" not in name or name.endswith("_with_indices"):
        return name
    adaptive = name.startswith("adaptive")
    always = adaptive and getattr(F, name, None) is not node.target  # torch's own returns both
    positional = (*node.args[2 if adaptive else 6 :], False)
    return f"{name}_with_indices" if always or node.kwargs.get("return_indices", positional[0]) else name
