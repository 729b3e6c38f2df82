"""Least-squares fit of one tensor to another, per channel, accumulated batch by batch."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_ROUNDING = 1e-12  # a channel whose standard deviation is below 1e-6 of its mean is constant


class ChannelFit:
    """y ~ slope * x + intercept for each channel, over all samples and pixels.

    Holds means and sums of squared deviations in float64, merged batch by batch (Chan, Golub and LeVeque,
    1983): memory does not grow with the number of samples, there is no cancellation, and the order of the
    samples changes the result only by rounding.

    Attributes:
        count: number of values per channel so far.
        mean_x, mean_y: [C].
        xx, xy, yy: sums of products of the deviations from the means, [C].
    """

    def __init__(self) -> None:
        self.count = 0
        zero = torch.zeros((), dtype=torch.float64)
        self.mean_x = self.mean_y = self.xx = self.xy = self.yy = zero

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch of x and y, each [N, C, *]."""
        x, y = _by_channel(x), _by_channel(y)
        if not x.shape[1]:
            return
        batch = ChannelFit()
        batch.count, batch.mean_x, batch.mean_y = x.shape[1], x.mean(1), y.mean(1)
        dx, dy = x - batch.mean_x[:, None], y - batch.mean_y[:, None]
        batch.xx, batch.xy, batch.yy = (dx * dx).sum(1), (dx * dy).sum(1), (dy * dy).sum(1)
        self.merge(batch)

    def merge(self, other: "ChannelFit") -> None:
        """Merges `other`, for example from samples on another machine."""
        total = self.count + other.count
        if not total:
            return
        share = self.count * other.count / total
        away_x, away_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        self.xx = self.xx + other.xx + share * away_x * away_x
        self.xy = self.xy + other.xy + share * away_x * away_y
        self.yy = self.yy + other.yy + share * away_y * away_y
        self.mean_x = self.mean_x + away_x * (other.count / total)
        self.mean_y = self.mean_y + away_y * (other.count / total)
        self.count = total

    def solve(self, default: Tensor) -> tuple[Tensor, Tensor]:
        """(slope, intercept), float64 [C] on the CPU: slope = cov(x, y) / var(x).

        `default` [C] is the slope of channels in which x is constant.
        """
        slope = torch.where(self._varies(self.xx, self.mean_x), self.xy / self.xx, default.double().cpu())
        return slope, self.mean_y - slope * self.mean_x

    def difference(self) -> float:
        """Mean square of x - y relative to the variance of y, both over all channels."""
        squares = self.xx - 2 * self.xy + self.yy + self.count * (self.mean_x - self.mean_y) ** 2
        varies = self._varies(self.yy, self.mean_y)
        left, total = squares[varies].clamp_min(0).sum(), self.yy[varies].sum()
        return float(left / total) if total > 0 else 0.0

    def _varies(self, squares: Tensor, mean: Tensor) -> Tensor:
        """Whether the deviations exceed the rounding of float32, per channel."""
        return squares > _ROUNDING * self.count * mean**2


def _by_channel(x: Tensor) -> Tensor:
    """[N, C, *] -> [C, N * S], in float64 on the CPU, because not every device has float64."""
    return x.detach().transpose(0, 1).flatten(1).cpu().double()


def merged(parts: Iterable[Mapping[str, ChannelFit]]) -> dict[str, ChannelFit]:
    """The fits of all `parts`, by name."""
    fits: dict[str, ChannelFit] = {}
    for part in parts:
        for name, fit in part.items():
            fits.setdefault(name, ChannelFit()).merge(fit)
    return fits
