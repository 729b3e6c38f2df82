"""Exact arithmetic on piecewise polynomials, against the functions of Python on a grid of rationals."""

import random
from collections.abc import Callable
from fractions import Fraction

import pytest

from pn_compiler.operators import piecewise
from pn_compiler.operators.piecewise import NotPiecewiseError, Piecewise, constant, identity

U = identity()
#: points among which are all edges below
GRID = [Fraction(k, 4) for k in range(-400, 401)]

Function = Callable[[Fraction], Fraction]
Pair = tuple[Piecewise, Function]


def clip(f: Piecewise, low: float, high: float) -> Piecewise:
    return piecewise.minimum(piecewise.maximum(f, constant(low)), constant(high))


STEP: Pair = (piecewise.compare(U, constant(1), lambda sign: sign >= 0), lambda u: Fraction(u >= 1))
RAMP: Pair = (clip(U, -2, 40), lambda u: min(max(u, Fraction(-2)), Fraction(40)))
HAT: Pair = (
    piecewise.maximum(
        constant(0), piecewise.add(constant(3), piecewise.maximum(U, piecewise.add(constant(0), U, -1)), -1)
    ),
    lambda u: max(Fraction(0), 3 - abs(u)),
)
LINE: Pair = (U, lambda u: u)
BASIS = [STEP, RAMP, HAT, LINE]


@pytest.mark.parametrize("seed", range(60))
def test_composed_functions_have_the_values_of_their_parts(seed: int) -> None:
    choice = random.Random(seed)
    (f, f_at), (g, g_at), (h, h_at) = (choice.choice(BASIS) for _ in range(3))
    composed: list[tuple[Callable[[], Piecewise], Function]] = [
        (lambda: piecewise.add(f, g, -2), lambda u: f_at(u) - 2 * g_at(u)),
        (lambda: piecewise.multiply(f, g), lambda u: f_at(u) * g_at(u)),
        (lambda: piecewise.maximum(f, g), lambda u: max(f_at(u), g_at(u))),
        (
            lambda: piecewise.minimum(piecewise.divide(f, constant(-4)), g),
            lambda u: min(f_at(u) / -4, g_at(u)),
        ),
        (
            lambda: piecewise.choose(piecewise.compare(f, g, lambda sign: sign > 0), h, f),
            lambda u: h_at(u) if f_at(u) > g_at(u) else f_at(u),
        ),
        (lambda: piecewise.compose(f, g), lambda u: f_at(g_at(u))),
    ]
    for build, expected in composed:
        function = build()
        assert all(function(u) == expected(u) for u in GRID)


def test_equal_functions_are_the_same_however_they_are_written() -> None:
    relu = piecewise.maximum(U, constant(0))
    written = piecewise.multiply(U, piecewise.compare(U, constant(0), lambda sign: sign > 0))
    assert relu == written
    assert piecewise.add(
        piecewise.maximum(U, constant(5)), piecewise.minimum(U, constant(5))
    ) == piecewise.add(U, constant(5))


def test_no_edge_and_no_value_at_an_edge_is_overlooked() -> None:
    at_or_above = piecewise.choose(
        piecewise.compare(U, constant(-40), lambda sign: sign >= 0), U, constant(0)
    )
    above = piecewise.choose(piecewise.compare(U, constant(-40), lambda sign: sign > 0), U, constant(0))
    assert not above.same_as(at_or_above)
    assert not clip(U, 0, 1e12).same_as(piecewise.maximum(U, constant(0)))
    third = piecewise.divide(U, constant(3))
    assert third.same_as(piecewise.multiply(U, constant(1 / 3)))
    assert not third.same_as(piecewise.multiply(U, constant(0.3333)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: piecewise.multiply(piecewise.multiply(U, U), U),
        lambda: piecewise.maximum(piecewise.multiply(U, U), constant(2)),  # an irrational edge
        lambda: piecewise.divide(U, U),
        lambda: piecewise.divide(U, constant(0)),
        lambda: constant(float("inf")),
    ],
)
def test_refuses_what_it_cannot_hold(build: Callable[[], Piecewise]) -> None:
    with pytest.raises(NotPiecewiseError):
        build()
