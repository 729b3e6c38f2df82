"""Exact arithmetic on piecewise polynomials of one variable, up to degree 2.

It represents what an expression of clamps, comparisons, products and sums computes on the whole real line:
its edges are known exactly, however far out, instead of guessed from values.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

Polynomial = tuple[Fraction, Fraction, Fraction]  # c0 + c1 u + c2 u^2

_ZERO = Fraction(0)
_SAME = Fraction(1, 10**7)  # relative: constants such as 1/6 are written with that many digits


class NotPiecewiseError(Exception):
    """The result is not a piecewise polynomial of degree 2 with rational edges."""


@dataclass(frozen=True)
class Piecewise:
    """A function of a real u.

    Attributes:
        edges: where one polynomial ends and the next begins, in ascending order.
        pieces: the polynomials between the edges, one more than there are edges.
        points: the values at the edges themselves.
        boolean: whether it is a truth value, 0 or 1.
    """

    edges: tuple[Fraction, ...]
    pieces: tuple[Polynomial, ...]
    points: tuple[Fraction, ...]
    boolean: bool = False

    def __call__(self, u: Fraction) -> Fraction:
        for k, edge in enumerate(self.edges):
            if u <= edge:
                return self.points[k] if u == edge else _value(self.pieces[k], u)
        return _value(self.pieces[-1], u)

    def same_as(self, other: "Piecewise") -> bool:
        """Whether both are equal everywhere, edges included, up to the last digits of constants."""
        if len(self.edges) != len(other.edges):
            return False
        numbers = [(*f.edges, *f.points, *itertools.chain.from_iterable(f.pieces)) for f in (self, other)]
        return all(abs(a - b) <= _SAME * abs(b) for a, b in zip(*numbers, strict=True))


def constant(value: float) -> Piecewise:
    return Piecewise((), ((_exact(value), _ZERO, _ZERO),), ())


def identity() -> Piecewise:
    return Piecewise((), ((_ZERO, Fraction(1), _ZERO),), ())


def from_pieces(pieces: Iterable[tuple[float, tuple[float, float, float]]]) -> Piecewise:
    """Built from (start, coefficients) of each polynomial; at a start it has the lower one's value."""
    reached = [(start, c) for start, c in pieces if start < math.inf]
    while len(reached) > 1 and reached[1][0] == -math.inf:
        reached.pop(0)
    known = [(start, tuple(map(_exact, c))) for start, c in reached]
    edges = tuple(_exact(start) for start, _ in known[1:])
    polynomials: tuple[Polynomial, ...] = tuple((c[0], c[1], c[2]) for _, c in known)
    return _simplified(
        edges, polynomials, tuple(_value(p, e) for p, e in zip(polynomials, edges, strict=False))
    )


def add(f: Piecewise, g: Piecewise, factor: float = 1) -> Piecewise:
    """f + factor g"""
    k = _exact(factor)
    return _combined(
        f, g, lambda p, q: (p[0] + k * q[0], p[1] + k * q[1], p[2] + k * q[2]), lambda x, y: x + k * y
    )


def multiply(f: Piecewise, g: Piecewise) -> Piecewise:
    result = _combined(f, g, _product, lambda x, y: x * y)
    return _as_boolean(result) if f.boolean and g.boolean else result


def divide(f: Piecewise, g: Piecewise) -> Piecewise:
    """f / g for a constant g."""
    if g.edges or g.pieces[0][1:] != (_ZERO, _ZERO) or not g.pieces[0][0]:
        raise NotPiecewiseError
    return multiply(f, Piecewise((), ((1 / g.pieces[0][0], _ZERO, _ZERO),), ()))


def compare(f: Piecewise, g: Piecewise, holds: Callable[[int], bool]) -> Piecewise:
    """1 where `holds` of the sign of f - g (-1, 0 or 1), else 0."""
    difference = _split_by_sign(add(f, g, -1))
    signs = [_sign(_value(p, u)) for p, u in zip(difference.pieces, _inside(difference.edges), strict=True)]
    pieces = tuple((Fraction(holds(sign)), _ZERO, _ZERO) for sign in signs)
    points = tuple(Fraction(holds(_sign(value))) for value in difference.points)
    return _as_boolean(_simplified(difference.edges, pieces, points))


def choose(condition: Piecewise, f: Piecewise, g: Piecewise) -> Piecewise:
    """f where `condition` is not 0, else g."""
    condition = compare(condition, constant(0), lambda sign: sign != 0)
    edges = sorted({*condition.edges, *f.edges, *g.edges})
    condition, f, g = (_refined(x, edges) for x in (condition, f, g))
    pieces = tuple(p if c[0] else q for c, p, q in zip(condition.pieces, f.pieces, g.pieces, strict=True))
    points = tuple(x if c else y for c, x, y in zip(condition.points, f.points, g.points, strict=True))
    result = _simplified(tuple(edges), pieces, points)
    return _as_boolean(result) if f.boolean and g.boolean else result


def maximum(f: Piecewise, g: Piecewise) -> Piecewise:
    return choose(compare(f, g, lambda sign: sign > 0), f, g)


def minimum(f: Piecewise, g: Piecewise) -> Piecewise:
    return choose(compare(f, g, lambda sign: sign < 0), f, g)


def compose(f: Piecewise, g: Piecewise) -> Piecewise:
    """f(g(u))"""
    if g == identity():
        return f
    result = _substituted(f.pieces[-1], g)
    for edge, polynomial, point in reversed(list(zip(f.edges, f.pieces, f.points, strict=False))):
        at = Piecewise((), ((edge, _ZERO, _ZERO),), ())
        here = Piecewise((), ((point, _ZERO, _ZERO),), ())
        result = choose(compare(g, at, lambda sign: sign == 0), here, result)
        result = choose(compare(g, at, lambda sign: sign < 0), _substituted(polynomial, g), result)
    return result


def _substituted(p: Polynomial, g: Piecewise) -> Piecewise:
    c0, c1, c2 = (Piecewise((), ((c, _ZERO, _ZERO),), ()) for c in p)
    linear = add(c0, multiply(c1, g))
    return add(linear, multiply(c2, multiply(g, g))) if p[2] else linear


def _exact(value: float) -> Fraction:
    if not math.isfinite(value):
        raise NotPiecewiseError
    return Fraction(value)


def _value(p: Polynomial, u: Fraction) -> Fraction:
    return p[0] + u * (p[1] + u * p[2])


def _sign(value: Fraction) -> int:
    return (value > 0) - (value < 0)


def _product(p: Polynomial, q: Polynomial) -> Polynomial:
    if p[1] * q[2] + p[2] * q[1] or p[2] * q[2]:
        raise NotPiecewiseError
    return p[0] * q[0], p[0] * q[1] + p[1] * q[0], p[0] * q[2] + p[1] * q[1] + p[2] * q[0]


def _as_boolean(f: Piecewise) -> Piecewise:
    return Piecewise(f.edges, f.pieces, f.points, boolean=True)


def _inside(edges: tuple[Fraction, ...]) -> list[Fraction]:
    """A point of each interval between the edges."""
    if not edges:
        return [_ZERO]
    return [edges[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(edges)), edges[-1] + 1]


def _refined(f: Piecewise, edges: list[Fraction]) -> Piecewise:
    """The same function with more edges."""
    pieces = tuple(f.pieces[sum(edge < u for edge in f.edges)] for u in _inside(tuple(edges)))
    return Piecewise(tuple(edges), pieces, tuple(f(edge) for edge in edges), f.boolean)


def _simplified(
    edges: tuple[Fraction, ...], pieces: tuple[Polynomial, ...], points: tuple[Fraction, ...]
) -> Piecewise:
    """Drops the edges at which nothing changes."""
    kept = [
        k
        for k, edge in enumerate(edges)
        if pieces[k] != pieces[k + 1] or points[k] != _value(pieces[k], edge)
    ]
    rest = (pieces[0], *(pieces[k + 1] for k in kept))
    return Piecewise(tuple(edges[k] for k in kept), rest, tuple(points[k] for k in kept))


def _combined(
    f: Piecewise,
    g: Piecewise,
    polynomials: Callable[[Polynomial, Polynomial], Polynomial],
    values: Callable[[Fraction, Fraction], Fraction],
) -> Piecewise:
    edges = sorted({*f.edges, *g.edges})
    f, g = _refined(f, edges), _refined(g, edges)
    pieces = tuple(itertools.starmap(polynomials, zip(f.pieces, g.pieces, strict=True)))
    return _simplified(
        tuple(edges), pieces, tuple(itertools.starmap(values, zip(f.points, g.points, strict=True)))
    )


def _split_by_sign(f: Piecewise) -> Piecewise:
    """Adds edges at its roots, so that no piece changes its sign."""
    bounds = [None, *f.edges, None]
    roots = [
        root
        for p, (low, high) in zip(f.pieces, itertools.pairwise(bounds), strict=True)
        for root in _roots(p)
        if (low is None or root > low) and (high is None or root < high)
    ]
    return _refined(f, sorted({*f.edges, *roots}))


def _roots(p: Polynomial) -> list[Fraction]:
    c0, c1, c2 = p
    if not c2:
        return [-c0 / c1] if c1 else []
    discriminant = c1 * c1 - 4 * c2 * c0
    if discriminant < 0:
        return []
    root = Fraction(math.isqrt(discriminant.numerator), math.isqrt(discriminant.denominator))
    if root * root != discriminant:
        raise NotPiecewiseError
    return [(-c1 - root) / (2 * c2), (-c1 + root) / (2 * c2)]
