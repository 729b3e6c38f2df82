"""Identifies which activation of torch.nn a function is, by its pieces or by its values."""

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pn_compiler.operators.activations import kinks_of, pieces_of
from pn_compiler.operators.piecewise import NotPiecewiseError, Piecewise, from_pieces

_SAME_VALUES = 1e-7  # float32 rounding; constants such as 0.79788456 have that many digits
_SAME_SLOPES = 1e-5
_PIECEWISE: tuple[nn.Module, ...] = (nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.Hardsigmoid())
_OTHERS: tuple[nn.Module, ...] = (
    nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.ELU(),
    nn.SELU(), nn.Softsign(), nn.LogSigmoid(), nn.Tanhshrink(),
)  # fmt: skip


def piecewise_of(activation: nn.Module) -> Piecewise | None:
    """The activation as a piecewise polynomial, if it is one with coefficients that are numbers."""
    pieces = pieces_of(activation)
    if pieces is None or any(isinstance(c, Tensor) for _, coefficients in pieces for c in coefficients):
        return None
    try:
        return from_pieces(pieces)  # type: ignore[arg-type]  # numbers, as just checked
    except NotPiecewiseError:
        return None


def known_piecewise(function: Piecewise) -> nn.Module | None:
    """The activation of torch.nn that equals `function` everywhere, else None."""
    for candidate in (*_PIECEWISE, *_by_edges(function)):
        pieces = piecewise_of(candidate)
        if pieces is not None and function.same_as(pieces):
            return copy.deepcopy(candidate)
    return None


def _by_edges(function: Piecewise) -> Iterator[nn.Module]:
    """Candidate activations, with options read off the edges and the first piece."""
    edges, (constant, slope, _) = [float(edge) for edge in function.edges], function.pieces[0]
    if len(edges) == 1:
        (edge,) = edges
        yield nn.LeakyReLU(float(slope))
        yield nn.Hardtanh(edge, math.inf)
        yield nn.Hardtanh(-math.inf, edge)
        yield nn.Threshold(edge, float(constant))
    elif len(edges) == 2 and edges[0] < edges[1]:
        yield nn.Hardtanh(edges[0], edges[1])


@torch.no_grad()
def known_by_values(function: nn.Module, candidates: Sequence[nn.Module] = _OTHERS) -> nn.Module | None:
    """The activation that `function` equals on a dense grid, and far out, else None.

    Compared in train and in eval mode, to 1e-7 relative to 1 + the magnitude, from -1e6 to 1e6. A function
    that fails, overflows, or returns another shape matches none.
    """
    for x in (_near(), _far()):
        results = _results(function, x)
        candidates = [c for c in candidates if _all_equal(results, c(x))]
        if not candidates:
            return None
    return copy.deepcopy(candidates[0])


def known_module(module: nn.Module) -> nn.Module | None:
    """Like `known_by_values`, for a module with an opaque forward, against any activation.

    Its slopes must match as well, and it must run without reading values: a grid would miss a branch that
    depends on them.
    """
    with torch.no_grad():
        results = _results(module, -torch.ones(1, 1, 1, 1, dtype=torch.float64))
    leaky = [nn.LeakyReLU(-y.item()) for y in results[:1] if isinstance(y, Tensor) and y.numel() == 1]
    candidate = known_by_values(module, (*_PIECEWISE, *_OTHERS, *leaky))
    try:
        return (
            candidate
            if candidate is not None and _same_slopes(module, candidate) and _is_blind(module)
            else None
        )
    except Exception:  # somebody else's code
        return None


def _is_blind(module: nn.Module) -> bool:
    """Whether its forward runs without values."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        _run(module, mode.from_tensor(_near()))
    return True


def _run(function: nn.Module, x: Tensor) -> list[object]:
    return [copy.deepcopy(function).train(training)(x.clone()) for training in (True, False)]


def _results(function: nn.Module, x: Tensor) -> list[object]:
    """The results of `function` in train and in eval mode; empty if it fails."""
    try:
        return _run(function, x)
    except Exception:  # somebody else's code
        return []


def _all_equal(results: list[object], expected: Tensor) -> bool:
    tolerance = _SAME_VALUES * (1 + expected.abs())
    return bool(results) and all(
        isinstance(y, Tensor)
        and y.shape == expected.shape
        and bool(((y - expected).abs() <= tolerance).all())
        for y in results
    )


def _same_slopes(module: nn.Module, candidate: nn.Module) -> bool:
    """Whether both have the same gradient except where it jumps; a backward may be written by hand."""
    x = _near()
    inside = torch.ones_like(x, dtype=torch.bool)
    for kink in kinks_of(candidate):
        inside &= (x - kink).abs() > 1e-9
    with torch.enable_grad():
        actual, expected = (
            torch.autograd.grad(f(leaf * 1).sum(), leaf)[0]
            for f in (copy.deepcopy(module), candidate)
            for leaf in [x.clone().requires_grad_()]
        )
    return bool(((actual - expected).abs() <= _SAME_SLOPES * (1 + expected.abs()))[inside].all())


def _near() -> Tensor:
    return torch.linspace(-30.0, 30.0, 3000, dtype=torch.float64).view(2, 5, 15, 20)


def _far() -> Tensor:
    """From -1e6 to 1e6, densely up to 1,000 and towards 0; 0 is the only round number."""
    tails = torch.logspace(-12, 6, 2000, dtype=torch.float64)
    dense = torch.linspace(-1000.123, 1000.321, 39_999, dtype=torch.float64)
    return torch.cat([dense, tails, -tails, tails.new_zeros(1)]).view(4, 11, 25, 40)
