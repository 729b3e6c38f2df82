"""The input shape that is guessed from the first layer."""

import pytest
from torch import Tensor, nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.data.input_shape import guess_shape
from pn_compiler.tracing.trace_module import trace_module

IMAGES = (1, 5, 224, 224)
BEFORE = {
    "nothing": [],
    "a normalizer": [nn.BatchNorm2d(5), nn.GroupNorm(1, 5), nn.InstanceNorm2d(5)],
    "an activation": [nn.ReLU6(), nn.Hardtanh()],
    "padding": [nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ConstantPad2d(1, 0.5)],
    "a dropout": [nn.Dropout(), nn.Dropout2d(), nn.Identity()],
    "a pool": [nn.AvgPool2d(2), nn.Upsample(scale_factor=2)],
}


@pytest.mark.parametrize("before", BEFORE)
def test_it_is_seen_through_what_keeps_the_channels(before: str) -> None:
    model = nn.Sequential(*BEFORE[before], nn.Conv2d(5, 3, 1))
    assert guess_shape(model, trace_module(model)[0])[0] == IMAGES


class Moved(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else super().forward(x).transpose(1, 2)


@pytest.mark.parametrize("layer", [nn.PixelUnshuffle(2), nn.Unflatten(1, (4, 5)), Moved()])
def test_it_is_not_guessed_behind_other_layers(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.Conv2d(20, 3, 1))
    with pytest.raises(ConfigError, match="cannot be guessed"):
        guess_shape(model, trace_module(model, leaves=frozenset(["0"]))[0])
