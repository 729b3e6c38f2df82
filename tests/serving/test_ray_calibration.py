"""Calibration on a Ray cluster: what one process finds."""

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError
from pn_compiler.freezing.site_constants import estimate
from pn_compiler.running.inputs import Inputs
from pn_compiler.testing import randomize_batch_norms, relative_error
from tests.serving import ray_cluster
from tests.serving.ray_cluster import ray


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster.cluster(1, 1) as made:
        yield made


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Unlike each other, and not a whole number of batches."""
    torch.manual_seed(0)
    return torch.randn(300, 3, 8, 8) * torch.linspace(0.3, 3, 300)[:, None, None, None]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(1)
    layers = [
        layer
        for channels in (3, 8, 8)
        for layer in (nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    return randomize_batch_norms(nn.Sequential(*layers)).eval()


@pytest.fixture(scope="module")
def batches(cluster, images):
    from pn_compiler.integrations.ray import RayBatches

    made = RayBatches(ray.data.from_numpy(images.numpy()), batch_size=32, workers=2)
    assert [shard.count() for shard in made.shards] == [160, 140]
    return made


def test_calibration_is_that_of_one_process(model, images, batches) -> None:
    def calibrated(data, **options) -> dict[str, Tensor]:
        converted = pn_compiler.transform(model, warm_start="calibrate", calibration=data, **options)
        return dict(converted.named_parameters())

    one, many = calibrated(images.split(32)), calibrated(batches)
    part = calibrated(images[:160].split(32))  # what a lost shard would give
    assert many.keys() == one.keys()
    assert max(relative_error(many[name], one[name]) for name in one) < 1e-6
    assert max(relative_error(part[name], one[name]) for name in one) > 1e-2


def test_static_statistics_are_those_of_one_process(model, images, batches) -> None:
    from pn_compiler.integrations.ray import static_statistics

    network = pn_compiler.fold(pn_compiler.transform(model))
    norms = {name: norm for name, norm in network.named_modules() if type(norm) is nn.GroupNorm}
    assert len(norms) == 3
    with torch.no_grad():
        one = estimate(network, norms, map(Inputs.of, images.split(32)), frozen=False)
    many = static_statistics(network, batches)
    for name, pair in one.items():
        for found, expected in zip(many[name], pair, strict=True):
            assert relative_error(found, expected) < 1e-6


def test_freeze_statistics_reads_them(model, batches) -> None:
    converted = pn_compiler.transform(model)
    _, report = pn_compiler.freeze_statistics(converted, batches, max_samples=64)
    assert report.frozen == 3


def test_errors_are_those_of_one_process(model, images, cluster) -> None:
    from pn_compiler.integrations.ray import RayBatches

    broken = images.clone()
    broken[200] = torch.nan
    data = ray.data.from_numpy(broken.numpy())
    with pytest.raises(ConfigError, match="holds values that are nan or infinite"):
        pn_compiler.transform(model, warm_start="calibrate", calibration=RayBatches(data))
    with pytest.raises(ConfigError, match="no column image: it has data"):
        RayBatches(data, column="image")
    with pytest.raises(ConfigError, match="batch_size=0"):
        RayBatches(data, batch_size=0)
    with pytest.raises(ConfigError, match="no row"):
        RayBatches(data.limit(0))
