"""What the benchmark compares: functions from a network with BatchNorm to one without."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

import pn_compiler
from benchmarks import swaps

BATCH = 32  # samples in each batch of those that are read


class Variant(Protocol):
    """Makes a network from one with BatchNorm and from unlabelled samples [N, *], which some do not read."""

    needs_data: bool

    def __call__(self, network: nn.Module, samples: Tensor, options: Mapping[str, Any]) -> nn.Module:
        """`options` are those of `pn_compiler.distill` that belong to the network."""


@dataclasses.dataclass(frozen=True, slots=True)
class Swapped:
    """What there is without us; with `keep`, weight and bias of the BatchNorm stay. None is BatchNorm."""

    keep: bool | None
    needs_data: bool = False

    def __call__(self, network: nn.Module, samples: Tensor, options: Mapping[str, Any]) -> nn.Module:
        if self.keep is None:
            return network
        return swaps.group_norm(network) if self.keep else swaps.opacus(network)


@dataclasses.dataclass(frozen=True, slots=True)
class Converted:
    """By running statistics, without data, with options of `pn_compiler.transform`."""

    options: Mapping[str, Any]
    needs_data: bool = False

    def __call__(self, network: nn.Module, samples: Tensor, options: Mapping[str, Any]) -> nn.Module:
        return pn_compiler.transform(network, samples[:1], **self.options)


@dataclasses.dataclass(frozen=True, slots=True)
class Fitted:
    """Fitted to the samples as options of `pn_compiler.transform` say."""

    options: Mapping[str, Any]
    needs_data: bool = True

    def __call__(self, network: nn.Module, samples: Tensor, options: Mapping[str, Any]) -> nn.Module:
        return pn_compiler.transform(network, samples[:1], calibration=samples.split(BATCH), **self.options)


@dataclasses.dataclass(frozen=True, slots=True)
class Distilled:
    """Converted with options of `pn_compiler.transform`, and trained to match BatchNorm on the samples."""

    options: Mapping[str, Any]
    needs_data: bool = True

    def __call__(self, network: nn.Module, samples: Tensor, options: Mapping[str, Any]) -> nn.Module:
        converted = pn_compiler.transform(network, samples[:1], **self.options)
        distilled, _ = pn_compiler.distill(converted, network, samples.split(BATCH), **options)
        return distilled


ANCHORS = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9)

VARIANTS: dict[str, Variant] = {
    "BatchNorm": Swapped(None),
    "plain swap": Swapped(keep=True),
    "opacus": Swapped(keep=False),
    "layer": Converted({"norm": "layer"}),
    "group": Converted({"norm": "group"}),
    **{f"rms {anchor:g}": Converted({"norm": "rms", "anchor": anchor}) for anchor in ANCHORS},
    "default": Converted({}),  # rms, with a higher anchor
    "rms auto": Fitted({"anchor": "auto"}),
    "layer, calibrated": Fitted({"norm": "layer", "warm_start": "calibrate"}),
    "layer, distilled": Distilled({"norm": "layer"}),
    "rms 0.5, distilled": Distilled({"norm": "rms", "anchor": 0.5}),
    "default, distilled": Distilled({}),
}
