"""The one table of activations: how each is spelled in a graph, and its shape as a function.

Adding an activation is adding a row to `_BUILDERS`, and one to `_PIECES` if it is piecewise polynomial, to
`_STRIPS` if it is analytic, else to `_KINKS`.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pn_compiler.operators.op_names import operator_name

Coefficient = float | Tensor
#: Pieces of a piecewise polynomial, in rising order: where the piece begins, and (c0, c1, c2) of
#: c0 + c1 u + c2 u^2. The first begins at -inf.
Pieces = tuple[tuple[float, tuple[Coefficient, Coefficient, Coefficient]], ...]


def _ramp(lower: float, upper: float) -> Pieces:
    """clip(u, lower, upper)"""
    return (
        (-math.inf, (lower, 0.0, 0.0)),
        (lower, (0.0, 1.0, 0.0)),
        (upper, (upper, 0.0, 0.0)),
    )


def _leaky(slope: Coefficient) -> Pieces:
    return ((-math.inf, (0.0, slope, 0.0)), (0.0, (0.0, 1.0, 0.0)))


_HALF_RELU: Pieces = ((-math.inf, (0.0, 0.0, 0.0)), (0.0, (0.0, 1.0, 0.0)))

_PIECES: dict[type[nn.Module], Callable[[Any], Pieces]] = {
    nn.Identity: lambda m: ((-math.inf, (0.0, 1.0, 0.0)),),
    nn.ReLU: lambda m: _HALF_RELU,
    nn.ReLU6: lambda m: _ramp(0.0, 6.0),
    nn.Hardtanh: lambda m: _ramp(float(m.min_val), float(m.max_val)),
    nn.LeakyReLU: lambda m: _leaky(float(m.negative_slope)),
    nn.PReLU: lambda m: _leaky(m.weight),
    nn.Threshold: lambda m: (
        (-math.inf, (float(m.value), 0.0, 0.0)),
        (float(m.threshold), (0.0, 1.0, 0.0)),
    ),
    nn.Hardswish: lambda m: (  # u (u + 3) / 6 between -3 and 3
        (-math.inf, (0.0, 0.0, 0.0)),
        (-3.0, (0.0, 0.5, 1 / 6)),
        (3.0, (0.0, 1.0, 0.0)),
    ),
    nn.Hardsigmoid: lambda m: (  # u / 6 + 1/2 between -3 and 3
        (-math.inf, (0.0, 0.0, 0.0)),
        (-3.0, (0.5, 1 / 6, 0.0)),
        (3.0, (1.0, 0.0, 0.0)),
    ),
}

#: Activations that are analytic on the real line -> half the width of the strip around it in which they
#: remain so: the imaginary part of their nearest pole. GELU is entire; its tanh form has poles at
#: 0.63 + 2.75i and so on; the 2 also bounds how erf grows.
_STRIPS: dict[type[nn.Module], float] = {
    nn.SiLU: math.pi,
    nn.GELU: 2.0,
    nn.Mish: 3 * math.pi / 4,
    nn.Softplus: math.pi,
    nn.Sigmoid: math.pi,
    nn.LogSigmoid: math.pi,
    nn.Tanh: math.pi / 2,
    nn.Tanhshrink: math.pi / 2,
}

_NO_JUMP = 1e-8  # a hundredth of the error allowed in the moments

#: The others, with the points where their derivatives jump.
_KINKS: dict[type[nn.Module], tuple[float, ...]] = {
    nn.Softsign: (0.0,),
    nn.ELU: (0.0,),
    nn.SELU: (0.0,),
    nn.CELU: (0.0,),
}

_HOMOGENEOUS = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU)


def is_activation(module: nn.Module) -> bool:
    """Whether `module` is an elementwise activation in the table; Identity is not."""
    return type(module) is not nn.Identity and any(type(module) in t for t in (_PIECES, _STRIPS, _KINKS))


def activation_name(module: nn.Module) -> str:
    """Name for reports: the class name in lower case, such as "relu6"."""
    return type(module).__name__.lower()


def pieces_of(activation: object) -> Pieces | None:
    """The pieces of a piecewise polynomial activation, else None."""
    describe = _PIECES.get(type(activation))  # type: ignore[arg-type]  # any object is allowed
    return describe(activation) if describe else None


def kinks_of(activation: object) -> tuple[float, ...]:
    """Points where a derivative of the activation jumps; 0 is assumed for an unknown callable."""
    pieces = pieces_of(activation)
    if pieces is not None:
        return tuple(start for start, _ in pieces[1:])
    if strip_of(activation) is not None:
        return ()
    if type(activation) is nn.Softplus:
        return (activation.threshold * scale_of(activation) * math.copysign(1.0, activation.beta),)
    return _KINKS.get(type(activation), (0.0,))  # type: ignore[arg-type]  # as above


def strip_of(activation: object) -> float | None:
    """d if the activation is in the table and analytic where |Im u| < d, else None."""
    strip = _STRIPS.get(type(activation))  # type: ignore[arg-type]  # any object is allowed
    if type(activation) is nn.Softplus:
        return None if has_jumps(activation) else math.pi * scale_of(activation)
    return strip


def has_jumps(activation: object) -> bool:
    """Whether the activation itself, not just a derivative, is known to jump somewhere."""
    if type(activation) is nn.Softplus:  # u beyond the threshold; the default one leaves a jump of 2e-9
        return _softplus_jump(activation) > _NO_JUMP
    pieces = pieces_of(activation) or ()
    return any(
        not isinstance(gap, Tensor) and abs(gap) > _NO_JUMP
        for (_, p), (edge, q) in itertools.pairwise(pieces)
        if math.isfinite(edge)
        for gap in [q[0] - p[0] + edge * (q[1] - p[1] + edge * (q[2] - p[2]))]
    )


def _softplus_jump(softplus: nn.Softplus) -> float:
    below = math.exp(-abs(softplus.threshold))  # log(1 + e^x) - max(x, 0) is even in x
    return (math.log1p(below) + max(-softplus.threshold, 0.0)) * scale_of(softplus)


def scale_of(activation: object) -> float:
    """The width of u over which the activation bends, relative to the others in the table."""
    if type(activation) is nn.Softplus:
        return 1 / max(abs(float(activation.beta)), 1e-6)
    if type(activation) is nn.CELU:
        return abs(float(activation.alpha))
    return 1.0


def has_long_tails(activation: object) -> bool:
    """Whether the activation approaches its asymptotes as slowly as 1 / u."""
    return type(activation) is nn.Softsign


def is_homogeneous(activation: nn.Module) -> bool:
    """Whether phi(k u) = k phi(u) for every k > 0: a positive scale commutes with it."""
    return isinstance(activation, _HOMOGENEOUS)


def reading_input(activation: nn.Module) -> nn.Module:
    """The same activation with a gradient that does not need its output, for outputs that may be overwritten.

    Among the activations that a graph can spell in other ways, only ReLU keeps its output for the gradient.
    """
    return nn.Hardtanh(0.0, math.inf) if type(activation) is nn.ReLU else activation


def clip_bounds(activation: nn.Module) -> tuple[float, float] | None:
    """(lower, upper) if the activation is clip(u, lower, upper), else None."""
    if type(activation) is nn.ReLU:
        return 0.0, math.inf
    if isinstance(activation, nn.Hardtanh):  # ReLU6 is a subclass
        return float(activation.min_val), float(activation.max_val)
    return None


_IN_PLACE: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.SiLU: lambda m, x: F.silu(x, inplace=True),
    nn.Mish: lambda m, x: F.mish(x, inplace=True),
    nn.Hardswish: lambda m, x: F.hardswish(x, inplace=True),
    nn.Hardsigmoid: lambda m, x: F.hardsigmoid(x, inplace=True),
    nn.LeakyReLU: lambda m, x: F.leaky_relu(x, m.negative_slope, inplace=True),
    nn.ELU: lambda m, x: F.elu(x, m.alpha, inplace=True),
    nn.Sigmoid: lambda m, x: x.sigmoid_(),
    nn.Tanh: lambda m, x: x.tanh_(),
}


def run_in_place(activation: nn.Module, x: Tensor) -> Tensor:
    """Applies the activation to `x`, which it may overwrite: new memory would cost more than the activation.

    A clip needs no memory for its gradient either; the others overwrite `x` only if no gradient is recorded.
    """
    bounds = clip_bounds(activation)
    if bounds is not None:
        return F.relu_(x) if bounds == (0, math.inf) else F.hardtanh_(x, *bounds)
    run = None if torch.is_grad_enabled() else _IN_PLACE.get(type(activation))
    result: Tensor = activation(x) if run is None else run(activation, x)
    return result


def same_activation(one: nn.Module, other: nn.Module) -> bool:
    """Whether two activation modules compute the same function: same class, equal options."""
    if one is other:
        return True
    if list(one.parameters()) or list(other.parameters()):
        return False
    return type(one) is type(other) and one.extra_repr() == other.extra_repr()


# Spellings in a graph. Each builder has the signature of the function that it stands for, without the input.


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> nn.Module | None:
    if not all(isinstance(bound, int | float) for bound in (min_val, max_val)):
        return None
    if not min_val < max_val or (min_val, max_val) == (-math.inf, math.inf):
        return None  # constant or empty
    if (min_val, max_val) == (0, math.inf):
        return nn.ReLU()
    return nn.ReLU6() if (min_val, max_val) == (0, 6) else nn.Hardtanh(float(min_val), float(max_val))


def _clamp(min: Any = None, max: Any = None) -> nn.Module | None:  # noqa: A002  # torch's names
    return _hardtanh(-math.inf if min is None else min, math.inf if max is None else max)


def _elu(
    alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0, inplace: bool = False
) -> nn.Module | None:
    return nn.ELU(alpha) if (scale, input_scale) == (1, 1) else None


def _plain(cls: type[nn.Module]) -> Callable[..., nn.Module]:
    def build(*, inplace: bool = False) -> nn.Module:
        return cls()

    return build


_BUILDERS: dict[str, Callable[..., nn.Module | None]] = {
    "relu": _plain(nn.ReLU),
    "relu6": _plain(nn.ReLU6),
    "silu": _plain(nn.SiLU),
    "mish": _plain(nn.Mish),
    "selu": _plain(nn.SELU),
    "sigmoid": _plain(nn.Sigmoid),
    "tanh": _plain(nn.Tanh),
    "hardswish": _plain(nn.Hardswish),
    "hardsigmoid": _plain(nn.Hardsigmoid),
    "logsigmoid": _plain(nn.LogSigmoid),
    "log_sigmoid": _plain(nn.LogSigmoid),
    "softsign": _plain(nn.Softsign),
    "tanhshrink": _plain(nn.Tanhshrink),
    "gelu": lambda approximate="none": nn.GELU(approximate),
    "leaky_relu": lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope),
    "celu": lambda alpha=1.0, inplace=False: nn.CELU(alpha),
    "softplus": lambda beta=1.0, threshold=20.0: nn.Softplus(beta, threshold),
    **dict.fromkeys(  # F.threshold calls itself "_threshold"
        ("threshold", "_threshold"), lambda threshold, value, inplace=False: nn.Threshold(threshold, value)
    ),
    "elu": _elu,
    "hardtanh": _hardtanh,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda min: _clamp(min=min),  # noqa: A006  # torch's name
    "clamp_max": lambda max: _clamp(max=max),  # noqa: A006
}


def activation_of(node: fx.Node) -> nn.Module | None:
    """A fresh module for the activation that a function or method node computes, else None."""
    build = _BUILDERS.get(operator_name(node).removesuffix("_"))
    options, keywords = node.args[1:], {k: v for k, v in node.kwargs.items() if k != "input"}
    if build is None or any(isinstance(o, fx.Node) for o in (*options, *keywords.values())):
        return None  # not an activation, or its bounds are computed in the graph
    try:
        inspect.signature(build).bind(*options, **keywords)
    except TypeError:
        return None
    return build(*options, **keywords)


def activation_functions() -> frozenset[Callable[..., Any]]:
    """The torch functions that spell an activation: pure, so safe to name in a pickle."""
    spellings = ((space, name) for space in (F, torch, torch._C._nn) for name in _BUILDERS)
    return frozenset(getattr(space, name) for space, name in spellings if hasattr(space, name))
