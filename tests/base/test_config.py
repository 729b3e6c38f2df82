import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pn_compiler.base.config import DEFAULT_ANCHOR, TransformConfig, norm_name
from pn_compiler.base.errors import ConfigError


def test_layer_norm_is_the_default() -> None:
    assert TransformConfig().groups_for(64) == 1


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (7, 1), (13, 1), (16, 2), (40, 5), (64, 8), (72, 9), (256, 32), (264, 24)],
)
def test_groups_without_a_number_leave_eight_channels(channels: int, groups: int) -> None:
    assert TransformConfig(norm="group").groups_for(channels) == groups


@settings(deadline=None)
@given(channels=st.integers(1, 4096), asked=st.integers(1, 256))
def test_groups_always_divide(channels: int, asked: int) -> None:
    assert TransformConfig(num_groups=asked).groups_for(channels) == math.gcd(channels, asked)
    automatic = TransformConfig(norm="group").groups_for(channels)
    assert channels % automatic == 0
    assert automatic == 1 or (automatic <= 32 and channels // automatic >= 8)
    assert channels % TransformConfig(norm="instance").groups_for(channels) == 0


def test_num_groups_alone_means_group_norm() -> None:
    assert TransformConfig(num_groups=4).norm == "group"
    assert TransformConfig(norm="layer", num_groups=4).norm == "group"
    assert TransformConfig(norm="rms", num_groups=4).norm == "rms"


def test_without_a_warm_start_there_is_no_population_to_be_near_to() -> None:
    assert TransformConfig().norm == "rms"
    assert TransformConfig(warm_start="none").norm == "layer"


def test_by_default_a_site_is_anchored_where_it_starts_warm() -> None:
    assert TransformConfig().anchor_for("bn", warm=True) == DEFAULT_ANCHOR
    assert TransformConfig().anchor_for("bn", warm=False) == 0
    assert TransformConfig(norm="layer").anchor_for("bn", warm=True) == 0
    assert TransformConfig(anchor=0.5).anchor_for("bn", warm=False) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "'layer', 'group', 'instance'"),
        ({"warm_start": "hot"}, "'auto', 'running_stats', 'calibrate', 'none'"),
        ({"proxy_padding": "zeros"}, "'activation', 'output'"),
        ({"num_groups": 0}, "positive integer"),
        ({"num_groups": 2.5}, "positive integer"),
        ({"norm": "instance", "num_groups": 2}, "num_groups goes with norm='group'"),
        ({"proxy_eps": 0.0}, "positive number"),
        ({"proxy_eps": float("nan")}, "positive number"),
    ],
)
def test_impossible_options_name_the_choices(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformConfig(**options)  # type: ignore[arg-type]


def test_norm_names() -> None:
    assert [norm_name(g, 8) for g in (1, 4, 8)] == ["layer", "group", "instance"]
