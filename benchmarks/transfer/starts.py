"""Where training starts: a trained network with a new head, after each way to replace BatchNorm."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.real_networks import networks
from benchmarks.real_networks.variants import Converted, Distilled, Swapped, Variant
from benchmarks.transfer import data
from benchmarks.transfer.options import Options

_HIDDEN = -200.0  # bias of the new classes beside the old ones: no softmax sees them, at temperature 4 either


@dataclasses.dataclass(frozen=True, slots=True)
class Backbone:
    """A trained network.

    Attributes:
        load: the network, without dropout and stochastic depth.
        head: path of its last layer, an nn.Linear.
    """

    load: Callable[[], nn.Module]
    head: str


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """A way to fine-tune.

    Attributes:
        make: replaces BatchNorm.
        frozen: whether BatchNorms stay in eval mode, with trained weight and bias.
    """

    make: Variant
    frozen: bool = False


def _lite(size: int) -> Backbone:
    def load() -> nn.Module:
        network: Any = networks.efficientnet_lite(size)
        network._dropout.p = 0.0  # all methods alike: one pass over so few images needs neither
        network._global_params = network._global_params._replace(drop_connect_rate=0.0)
        return network  # type: ignore[no-any-return]

    return Backbone(load, "_fc")


def _converted(norm: str, anchor: float, proxy: bool) -> Method:
    return Method(Converted({"norm": norm, "anchor": anchor, "proxy": proxy}))


BACKBONES = {f"efficientnet-lite{size}": _lite(size) for size in (0, 1, 2)}
METHODS: Mapping[str, Method] = {
    "BatchNorm": Method(Swapped(None)),
    "frozen BatchNorm": Method(Swapped(None), frozen=True),
    "opacus": Method(Swapped(keep=False)),
    "layer": _converted("layer", 0.0, proxy=False),
    "layer + PN": _converted("layer", 0.0, proxy=True),
    "rms 0.5": _converted("rms", 0.5, proxy=False),
    "rms 0.5 + PN": _converted("rms", 0.5, proxy=True),
    "rms 0.75": _converted("rms", 0.75, proxy=False),
    "rms 0.75 + PN": _converted("rms", 0.75, proxy=True),
    "rms 0.875": _converted("rms", 0.875, proxy=False),
    "rms 0.875 + PN": _converted("rms", 0.875, proxy=True),
}
#: opacus refuses BatchNorm even where it is frozen; what converts to it computes the same
PRIVATE_METHODS: Mapping[str, Method] = {
    "frozen BatchNorm": _converted("rms", 1.0, proxy=False),
    **{
        name: METHODS[name]
        for name in ("opacus", "layer + PN", "rms 0.75 + PN", "rms 0.875", "rms 0.875 + PN")
    },
}


def methods(options: Options) -> Mapping[str, Method]:
    """Those that are compared."""
    return PRIVATE_METHODS if options.private else METHODS


def start(target: str, method: str, seed: int, options: Options) -> nn.Module:
    """The network of a method, with the head of a seed: the same function of the features for all methods."""
    network = copy.deepcopy(_replaced(method, target if options.distilled else None, options))
    head = network.get_submodule(BACKBONES[options.network].head)
    old = len(head.weight) - options.seeds * data.CLASSES
    rows = slice(old + seed * data.CLASSES, old + (seed + 1) * data.CLASSES)
    head.weight = nn.Parameter(head.weight.detach()[rows].clone())
    head.bias = nn.Parameter(head.bias.detach()[rows] - _HIDDEN)
    head.out_features = data.CLASSES
    return network


@functools.cache  # runs that follow each other often differ in nothing but rate and seed
def _replaced(method: str, target: str | None, options: Options) -> nn.Module:
    """The network of a method, distilled on the images of a target if there is one, with all heads.

    It is converted with the old head and those of all seeds in one layer, for a converted head may have
    absorbed scale and shift of the features. Each class has its own weights, so that those of a seed can be
    taken out afterwards.
    """
    backbone = BACKBONES[options.network]
    network = backbone.load().eval()
    old = network.get_submodule(backbone.head)
    network.set_submodule(backbone.head, _with_new_classes(old, options.seeds))
    make = methods(options)[method].make
    if target is not None and isinstance(make, Converted):
        images, _ = data.load(target, options)["train"]
        return Distilled(make.options)(network, images, {})
    return make(network, torch.zeros(1, 3, options.pixels, options.pixels), {})


def _with_new_classes(old: Any, seeds: int) -> nn.Linear:
    """A head with the old classes, and new ones for each seed, as nn.Linear begins but without bias."""
    bound = 1 / math.sqrt(old.in_features)
    weights: list[Tensor] = [old.weight.detach()]
    for seed in range(seeds):
        weight = torch.empty(data.CLASSES, old.in_features)
        weights.append(weight.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed)))
    head = nn.Linear(old.in_features, sum(map(len, weights)))
    head.weight = nn.Parameter(torch.cat(weights))
    new = torch.full((seeds * data.CLASSES,), _HIDDEN)
    head.bias = nn.Parameter(torch.cat([old.bias.detach(), new]))
    return head
