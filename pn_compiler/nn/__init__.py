"""Layers of a converted network: sites with proxy normalization, and layers that apply or absorb them."""

from pn_compiler.nn.consumers import (
    INPUT_AFFINE,
    ChannelAffine,
    ConstantAffine,
    ConstantClamp,
    InputAffineConv1d,
    InputAffineConv2d,
    InputAffineConv3d,
    InputAffineLinear,
    ReadTraining,
)
from pn_compiler.nn.proxy_norm import (
    FollowedGroupNorm,
    FollowedProxyNormAct,
    FunctionalGroupNorm,
    Output,
    ProxyNormAct,
    ProxyStatistics,
    Recipe,
    SiteGroup,
    put_behind,
)

__all__ = [
    "INPUT_AFFINE",
    "ChannelAffine",
    "ConstantAffine",
    "ConstantClamp",
    "FollowedGroupNorm",
    "FollowedProxyNormAct",
    "FunctionalGroupNorm",
    "InputAffineConv1d",
    "InputAffineConv2d",
    "InputAffineConv3d",
    "InputAffineLinear",
    "Output",
    "ProxyNormAct",
    "ProxyStatistics",
    "ReadTraining",
    "Recipe",
    "SiteGroup",
    "put_behind",
]
