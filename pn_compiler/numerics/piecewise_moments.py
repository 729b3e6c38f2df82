"""Mean and variance of a piecewise polynomial under a Gaussian, in closed form."""

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pn_compiler.numerics.quadrature import is_transformed
from pn_compiler.operators.activations import Coefficient, Pieces

# Seen from m, a piecewise polynomial f is the piece P that contains m, plus, at each edge e, a polynomial in
# u - e on the far side: the difference of the pieces that meet there. With a = m - e, z = a / s, the normal
# density phi, and [m >= e] 1 or 0,
#
#     T_n = E ((u - e)+^n - [m >= e] (u - e)^n):
#     T_0 = Phi(z) - [m >= e],   T_1 = a T_0 + s phi(z),   T_n = a T_(n-1) + (n - 1) s^2 T_(n-2)
#     dT_n/dm = n T_(n-1),   dT_n/ds = n (n - 1) s T_(n-2);   dT_1/ds = phi(z),   dT_0/dm = phi(z) / s, ...
#
# These vanish where the edge is far from m on the scale of s, on either side, so neither bounds of 1e9 nor
# means of 1e4 cost digits. The sums over the edges for f, f^2 and their slopes are one matrix, which depends
# only on f, times a column of such terms. With c = P(m), b = P'(m) and q the coefficient of u^2 in P,
#
#     E f = c + q s^2 + (sum for f)
#     E (f - c)^2 = b^2 s^2 + 3 q^2 s^4 + (sum for f^2) - 2 c (sum for f)
#     var = E (f - c)^2 - (E f - c)^2

_PEAK = 1 / math.sqrt(2 * math.pi)  # peak of the normal density
_REACH = 1e15  # beyond any mean and spread; squares up to it still fit float32


class Moments(NamedTuple):
    """Mean and variance of f(u) and, if requested, their slopes in m and s, u ~ Normal(m, s^2): [2, *]."""

    mean: Tensor
    var: Tensor
    mean_by: Tensor | None = None
    var_by: Tensor | None = None


def by_pieces(pieces: Pieces, m: Tensor, s: Tensor, *, slopes: bool) -> Moments:
    """Moments of the function with these pieces; `s` is not 0."""
    pieces = _within_reach(pieces)
    a = [m - edge if edge else m for edge, _ in pieces[1:]]
    beyond = torch.stack(a) >= 0 if a else None
    center, slope, bend = _piece_at(pieces, m, beyond)
    totals = _of_piece(slope, bend, m * 0, s)
    if beyond is None:
        squares = totals[3:]
    else:
        sums = _sums(pieces, torch.stack(a), beyond, s)
        totals = totals + sums
        squares = torch.addcmul(totals[3:], center, sums[:3], value=-2)
    mean, mean_by = totals[0], totals[1:3]
    var = torch.addcmul(squares[0], mean, mean, value=-1).clamp_min(0)
    if not slopes:
        return Moments(center + mean, var)
    return Moments(center + mean, var, mean_by, torch.addcmul(squares[1:], mean, mean_by, value=-2))


def _within_reach(pieces: Pieces) -> Pieces:
    """Drops the pieces that no u reaches, such as those beyond an infinite bound."""
    first = max(k for k, (start, _) in enumerate(pieces) if k == 0 or start < -_REACH)
    rest = tuple(piece for piece in pieces[first + 1 :] if piece[0] < _REACH)
    return ((-math.inf, pieces[first][1]), *rest)


def _rows(rows: list[list[Coefficient]], m: Tensor) -> Tensor:
    """[rows, columns], or with learned coefficients [rows, columns, *m.shape]."""
    if any(isinstance(c, Tensor) for row in rows for c in row):
        return torch.stack(
            [torch.stack([torch.as_tensor(c).to(m).expand_as(m) for c in row]) for row in rows]
        )
    return m.new_tensor(rows)


def _piece_at(pieces: Pieces, m: Tensor, beyond: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """P(m), P'(m), and the coefficient of u^2 unless it is 0 everywhere, of the piece P that contains m."""
    coefficients = [c for _, c in pieces]
    bends = not all(_is_zero(c2) for _, _, c2 in coefficients)
    table = _rows([list(column) for column in zip(*coefficients, strict=True)][: 3 if bends else 2], m)
    table = (
        table.view(*table.shape[:2], *m.shape)
        if table.dim() > 2
        else table.view(*table.shape, *[1] * m.dim())
    )
    at = table[:, 0].expand(-1, *m.shape)
    for k in range(len(pieces) - 1):
        assert beyond is not None
        at = torch.where(beyond[k], table[:, k + 1], at)
    c0, c1, *c2 = at.unbind()
    if not c2:
        return torch.addcmul(c0, c1, m), c1, None
    return c0 + m * torch.addcmul(c1, c2[0], m), torch.addcmul(c1, c2[0], m, value=2), c2[0]


def _of_piece(slope: Tensor, bend: Tensor | None, zero: Tensor, s: Tensor) -> Tensor:
    """Rows like those of `_sums`, about P(m), for a polynomial with this slope and u^2 coefficient at m."""
    spread = slope * s
    if bend is None:
        return torch.stack((zero, slope, zero, spread * spread, zero, 2 * slope * spread))
    curve = bend * s
    mean = curve * s
    square, by_s = torch.addcmul(spread * spread, mean, mean, value=3), slope * spread + 6 * curve * mean
    return torch.stack((mean, slope, 2 * curve, square, 6 * slope * mean, 2 * by_s))


def _sums(pieces: Pieces, a: Tensor, beyond: Tensor, s: Tensor) -> Tensor:
    """The sums over the edges for E f, dE f/dm, dE f/ds, and the same for E f^2: [6, *s.shape]."""
    if any(isinstance(c, Tensor) for _, coefficients in pieces for c in coefficients):  # they may learn
        layout = _layout(pieces)
        return (_rows(_coefficients(pieces, layout), s) * _terms(layout, a, beyond, s)).sum(1)
    plan = _plan.__wrapped__ if is_transformed() else _plan  # compilers warn of a cache
    layout, coefficients = plan(pieces)
    matrix = _rows(coefficients, s)
    return (matrix @ _terms(layout, a, beyond, s).reshape(matrix.shape[1], -1)).view(-1, *s.shape)


class _Layout(NamedTuple):
    """Which terms exist: for each edge its T_0 to T_degree, and so on."""

    degree: int
    jumps: bool  # whether f jumps at an edge


def _layout(pieces: Pieces) -> _Layout:
    return _Layout(
        degree=2 if all(_is_zero(c2) for _, (_, _, c2) in pieces) else 4,
        jumps=any(not _is_zero(j[0]) for j in _jumps(pieces)),
    )


@functools.lru_cache(maxsize=256)
def _plan(pieces: Pieces) -> tuple[_Layout, list[list[Coefficient]]]:
    layout = _layout(pieces)
    return layout, _coefficients(pieces, layout)


def _terms(layout: _Layout, a: Tensor, beyond: Tensor, s: Tensor) -> Tensor:
    """[terms, *s.shape], in the order of `_coefficients`."""
    z = a / s
    density = torch.exp(-0.5 * z * z)  # times sqrt(2 pi)
    side = torch.where(beyond, -1.0, 1.0)
    powers = [side * torch.special.ndtr(side * z)]
    powers.append(torch.add(a * powers[0], s * density, alpha=_PEAK))
    scaled = []
    for n in range(2, layout.degree + 1):
        scaled.append(s * powers[n - 2])
        powers.append(torch.addcmul(a * powers[n - 1], s, scaled[n - 2], value=n - 1))
    rows = [*powers, *scaled, density]
    if layout.jumps:
        rows += [density / s, z * density / s]
    return torch.cat(rows)


def _coefficients(pieces: Pieces, layout: _Layout) -> list[list[Coefficient]]:
    """Six rows, for E f, dE f/dm, dE f/ds, and the same for E f^2, over the columns of `_terms`."""
    count, degree = len(pieces) - 1, layout.degree
    density = 2 * degree * count  # behind degree + 1 powers and degree - 1 scaled ones
    width = density + count * (3 if layout.jumps else 1)
    rows: list[list[Coefficient]] = [[0.0] * width for _ in range(6)]
    for first, jumps in ((0, _jumps(pieces)), (3, _jumps(pieces, squared=True))):
        value, by_m, by_s = rows[first : first + 3]
        for k, jump in enumerate(jumps):
            for n, j in enumerate(jump):
                if _is_zero(j):
                    continue
                value[n * count + k] = j
                if n == 0:
                    by_m[density + count + k] = j * _PEAK
                    by_s[density + 2 * count + k] = -j * _PEAK
                else:
                    by_m[(n - 1) * count + k] = n * j
                if n == 1:
                    by_s[density + k] = j * _PEAK
                elif n > 1:
                    by_s[(degree + 1 + n - 2) * count + k] = n * (n - 1) * j
    return rows


def _jumps(pieces: Pieces, *, squared: bool = False) -> list[list[Coefficient]]:
    """For each edge e, the coefficients in powers of (u - e)+ of what f, or f^2, gains there."""
    result = []
    for (_, before), (edge, after) in itertools.pairwise(pieces):
        p, q = (_around(edge, coefficients) for coefficients in (before, after))
        if squared:
            p, q = _square(p), _square(q)
        result.append([new - old for old, new in zip(p, q, strict=True)])
    return result


def _around(edge: float, coefficients: tuple[Coefficient, Coefficient, Coefficient]) -> list[Coefficient]:
    """Coefficients in powers of u - edge."""
    c0, c1, c2 = coefficients
    return [c0 + c1 * edge + c2 * edge * edge, c1 + 2 * c2 * edge, c2]


def _square(p: list[Coefficient]) -> list[Coefficient]:
    p0, p1, p2 = p
    return [p0 * p0, 2 * p0 * p1, p1 * p1 + 2 * p0 * p2, 2 * p1 * p2, p2 * p2]


def _is_zero(coefficient: Coefficient) -> bool:
    return not isinstance(coefficient, Tensor) and abs(coefficient) < 1e-12
