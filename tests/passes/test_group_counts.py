"""How many groups a normalizer gets: those asked for, and fewer where a group would hold one value."""

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import RefusedError
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_one_pixel_holds_one_value_per_channel() -> None:
    head = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    net = randomize_batch_norms(nn.Sequential(*head)).train()
    converted = pn_compiler.transform(net, IMAGES, norm="instance")
    (site,) = pn_compiler.sites(converted)
    assert (site.norm, site.code) == ("layer", "PN206")
    assert converted(IMAGES).flatten(1).std(0).min() > 1e-3
    assert net[2].num_batches_tracked == 0  # looking at shapes trains nothing
    single = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1))
    (site,) = pn_compiler.sites(pn_compiler.transform(nn.Sequential(*single), IMAGES))
    assert (site.kind, site.code) == ("skipped", "PN107")


class Mlp(nn.Module):
    """[N, C] inputs, where a group of one value would erase everything."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(5, features), nn.BatchNorm1d(features), nn.ReLU(), nn.Linear(features, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("options", [{}, {"norm": "group"}, {"num_groups": 4}], ids=str)
def test_flat_inputs_are_normalized_over_channels(options: dict[str, object]) -> None:
    net = randomize_batch_norms(Mlp()).eval()
    x = torch.randn(4, 5)
    converted = pn_compiler.transform(net, **options)
    (site,) = pn_compiler.sites(converted)
    assert site.kind == "pn"
    assert converted(x).std(0).min() > 1e-3  # not the same for every sample
    assert_same_outputs(pn_compiler.fold(converted)(x), converted(x))


@pytest.mark.parametrize("options", [{"norm": "instance"}, {"num_groups": 8}], ids=str)
def test_one_value_per_group_is_refused(options: dict[str, object]) -> None:
    net = randomize_batch_norms(Mlp()).eval()
    converted = pn_compiler.transform(net, **options)
    (site,) = pn_compiler.sites(converted)
    assert (site.norm, site.num_groups, site.code) == ("layer", 1, "PN206")
    (site,) = pn_compiler.sites(pn_compiler.transform(randomize_batch_norms(Mlp(1)).eval()))
    assert (site.kind, site.code) == ("skipped", "PN107")


def test_instance_norm_of_sequences_needs_their_rank() -> None:
    net = randomize_batch_norms(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1))).eval()
    (unknown,) = pn_compiler.sites(pn_compiler.transform(net, norm="instance"))
    assert unknown.code == "PN206"
    (known,) = pn_compiler.sites(pn_compiler.transform(net, torch.randn(2, 4, 9), norm="instance"))
    assert (known.kind, known.num_groups) == ("pn", 4)


def two_norms() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Conv2d(16, 2, 1),
    )  # fmt: skip
    return randomize_batch_norms(net).eval()  # type: ignore[return-value]


def test_groups_that_do_not_divide_are_reported() -> None:
    converted = pn_compiler.transform(two_norms(), num_groups=12)
    assert [(s.num_groups, s.code) for s in pn_compiler.sites(converted)] == [(4, "PN205")] * 2
    with pytest.raises(RefusedError, match="PN205 1: 12 groups do not divide 8 channels"):
        pn_compiler.transform(two_norms(), num_groups=12, strict=True)
