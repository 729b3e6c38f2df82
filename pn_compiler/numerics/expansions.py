"""A linear map from few channels to many, as two: to few channels with the same statistics, and from there.

The matrix M of the map is [C, n], n < C. Let U [C, k] have orthonormal columns that span those of M, and
Q [r, k] orthonormal ones, k <= r < C. With c = sqrt(r / C)

    A = c Q U^T M,   B = U Q^T / c        so that        B A = M,   A^T A / r = M^T M / C

For each x, the mean square over the r channels of A x is that over the C channels of M x. If U spans the
constant vector, too, and Q takes it to the constant one of the same length, the means are the same as well,
and B takes A x less its mean to M x less its mean.
"""

import math

import torch
from torch import Tensor


def fewest_rows(columns: int, *, centered: bool) -> int:
    """The smallest r for a matrix of `columns`: one more if the mean has to be kept."""
    return columns + centered


def factor(matrix: Tensor, rows: int, *, centered: bool) -> tuple[Tensor, Tensor]:
    """A [rows, n] and B [C, rows] of `matrix`; B is as well conditioned as an isometry.

    U comes from a QR decomposition, which is orthogonal whatever the rank of the matrix: there is none to
    decide about.

    Args:
        matrix: [C, n], finite, float64.
        rows: at least `fewest_rows` of n, and less than C.
        centered: whether the mean is kept, too.
    """
    channels, columns = matrix.shape
    ones = matrix.new_ones(channels, 1)
    basis, _ = torch.linalg.qr(torch.cat([ones, matrix], 1) if centered else matrix)
    isometry = torch.eye(rows, fewest_rows(columns, centered=centered), dtype=matrix.dtype)
    if centered:
        basis[:, 0] = 1 / math.sqrt(channels)  # it may have the other sign
        isometry = _mirrored(isometry)
    scale = math.sqrt(rows / channels)
    return scale * isometry @ (basis.T @ matrix), basis @ isometry.T / scale


def _mirrored(vectors: Tensor) -> Tensor:
    """`vectors` [r, k] mirrored such that the first unit vector becomes the constant one; r is 2 or more."""
    rows = len(vectors)
    normal = torch.full((rows, 1), -1 / math.sqrt(rows), dtype=vectors.dtype)
    normal[0] += 1
    return vectors - 2 * normal @ (normal.T @ vectors) / normal.square().sum()
