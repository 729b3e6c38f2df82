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
from pn_compiler.nn.normalizers import AnchoredNorm, FoldedNorm, Normalizer, Statistics, normalize
from pn_compiler.nn.proxy_norm import (
    FollowedAnchoredNorm,
    FollowedGroupNorm,
    FollowedProxyNormAct,
    Output,
    ProxyNormAct,
    ProxyStatistics,
    Recipe,
    SiteGroup,
    put_behind,
)

__all__ = [
    "INPUT_AFFINE",
    "AnchoredNorm",
    "ChannelAffine",
    "ConstantAffine",
    "ConstantClamp",
    "FoldedNorm",
    "FollowedAnchoredNorm",
    "FollowedGroupNorm",
    "FollowedProxyNormAct",
    "InputAffineConv1d",
    "InputAffineConv2d",
    "InputAffineConv3d",
    "InputAffineLinear",
    "Normalizer",
    "Output",
    "ProxyNormAct",
    "ProxyStatistics",
    "ReadTraining",
    "Recipe",
    "SiteGroup",
    "Statistics",
    "normalize",
    "put_behind",
]
