"""The options of a conversion, validated once."""

import dataclasses
import math
from typing import Literal, get_args

from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import check_flags, check_number, one_of

Norm = Literal["layer", "group", "instance"]
ProxyPadding = Literal["activation", "output"]
WarmStart = Literal["auto", "running_stats", "calibrate", "none"]

DEFAULT_NUM_GROUPS = 32  # Wu & He 2018, "Group Normalization"
MIN_CHANNELS_PER_GROUP = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TransformConfig:
    """Options of `pn_compiler.transform`; see there for their meaning."""

    norm: Norm = "layer"
    num_groups: int | None = None
    proxy: bool = True
    proxy_padding: ProxyPadding = "activation"
    warm_start: WarmStart = "auto"
    norm_only_bias: bool = True
    proxy_eps: float = 0.03

    def __post_init__(self) -> None:
        one_of("norm", self.norm, get_args(Norm))
        one_of("proxy_padding", self.proxy_padding, get_args(ProxyPadding))
        one_of("warm_start", self.warm_start, get_args(WarmStart))
        check_flags(proxy=self.proxy, norm_only_bias=self.norm_only_bias)
        if self.num_groups is not None:
            check_number("num_groups", self.num_groups, "a positive integer", 1, whole=True)
            if self.norm == "instance":
                raise ConfigError("num_groups goes with norm='group', not with norm='instance'")
            object.__setattr__(self, "norm", "group")  # num_groups alone means GroupNorm
        check_number("proxy_eps", self.proxy_eps, "a positive number", math.ulp(0))

    def groups_for(self, num_channels: int) -> int:
        """Number of groups for `num_channels` channels; always a divisor of it.

        "layer" is one group, "instance" one group a channel. "group" with ``num_groups`` takes the
        greatest common divisor; without, the most groups up to 32 that leave 8 channels in each.
        """
        if self.norm == "layer":
            return 1
        if self.norm == "instance":
            return num_channels
        if self.num_groups is not None:
            return math.gcd(num_channels, self.num_groups)
        most = max(1, min(DEFAULT_NUM_GROUPS, num_channels // MIN_CHANNELS_PER_GROUP))
        return next(g for g in range(most, 0, -1) if num_channels % g == 0)


def norm_name(num_groups: int, num_channels: int) -> Norm:
    """The usual name of a normalizer with `num_groups` groups over `num_channels` channels."""
    if num_groups == 1:
        return "layer"
    return "instance" if num_groups == num_channels else "group"
