"""Kinds of networks beside classifiers of images, and a slice of the zoo."""

import copy

import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import pn_compiler
from benchmarks.zoo import build, example_inputs, training_inputs, transform_one
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms, relative_error
from tests import zoo


def check(net: nn.Module, *inputs: object, tolerance: float = 1e-5) -> nn.Module:
    """Converts, and compares the warm start and the fold with what they must equal; returns the result."""
    net = randomize_batch_norms(net).eval()
    wanted = sum(isinstance(m, _BatchNorm) for m in net.modules())
    converted = pn_compiler.transform(net)
    sites = pn_compiler.sites(converted)
    assert len(sites) == wanted
    assert not any(isinstance(m, _BatchNorm) for m in converted.modules())
    with torch.no_grad():
        expected = pn_compiler.transform(net, proxy=False)(*inputs)
        assert_same_outputs(converted(*inputs), expected, tolerance=tolerance)
        assert_same_outputs(pn_compiler.fold(converted)(*inputs), expected, tolerance=tolerance)
    return converted


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def slow(name: str) -> ParameterSet:
    """One whose kinds of layers another network of its family has as well."""
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", slow("fcn_resnet50")]
)
def test_segmentation(name: str) -> None:
    models = zoo.torchvision().models.segmentation
    check(getattr(models, name)(weights=None, weights_backbone=None, num_classes=4), IMAGES)


@pytest.mark.parametrize("name", [slow("r3d_18"), "mc3_18", "r2plus1d_18"])
def test_video(name: str) -> None:
    model = getattr(zoo.torchvision().models.video, name)(weights=None)
    check(model, torch.randn(1, 3, 4, 32, 32))


DETECTORS = [
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    slow("fcos_resnet50_fpn"),
    slow("keypointrcnn_resnet50_fpn"),
    "maskrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn_v2",
    "ssdlite320_mobilenet_v3_large",
]


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name: str) -> None:
    torch.manual_seed(0)
    net = randomize_batch_norms(build("torchvision", name, meta=False))
    converted, plain = (pn_compiler.transform(net, proxy=proxy) for proxy in (True, False))
    assert not any(isinstance(m, _BatchNorm) for m in converted.modules())
    images = example_inputs(net, 2)
    with torch.no_grad():
        for actual, expected in zip(converted(*images), plain(*images), strict=True):
            assert actual.keys() == expected.keys()
            assert actual["scores"].isfinite().all()
        actual, expected = (model.backbone(torch.stack(images[0])) for model in (converted, plain))
        assert_same_outputs(actual, expected)
    losses = []
    for model in (converted.train(), plain.train()):
        torch.manual_seed(1)  # they sample proposals
        losses.append(model(*copy.deepcopy(training_inputs(net))))
    assert losses[0].keys() == losses[1].keys()
    for key in losses[0]:
        assert relative_error(losses[0][key], losses[1][key]) < 1e-3, key  # losses sum over anchors
    sum(losses[0].values()).backward()


class PointNet(nn.Module):
    """Shared MLP over points [N, 3, L], max over points, classifier over [N, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(
            nn.Conv1d(3, 16, 1),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 32, 1),
            nn.BatchNorm1d(32),
            nn.ReLU(),
        )
        self.head = nn.Sequential(
            nn.Linear(32, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)
        )

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.shared(points).max(dim=2).values)


def test_point_clouds() -> None:
    converted = check(PointNet(), torch.randn(3, 3, 20))
    assert [s.kind for s in pn_compiler.sites(converted)] == ["pn", "norm_only", "pn"]


class SelfSupervised(nn.Module):
    """An encoder with the projector and predictor of BYOL and Barlow Twins."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.projector = nn.Sequential(
            nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(inplace=True),
            nn.Linear(32, 16, bias=False), nn.BatchNorm1d(16, affine=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        return h, F.normalize(self.projector(h), dim=1)


def test_projector_heads() -> None:
    converted = check(SelfSupervised(), IMAGES)
    kinds = [(s.kind, s.code) for s in pn_compiler.sites(converted)]
    assert kinds == [("norm_only", "PN202"), ("pn", None), ("norm_only", "PN201")]


def test_one_dimensional_residual_network() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv1d(8, 8, 5, padding="same"), nn.Conv1d(8, 8, 5, padding=2)
            self.bn1, self.bn2 = nn.BatchNorm1d(8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv2(F.elu(self.bn2(self.conv1(F.elu(self.bn1(x))))))

    net = nn.Sequential(
        nn.Conv1d(2, 8, 7, padding=3), Block(), Block(), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    )
    converted = check(net, torch.randn(2, 2, 50))
    assert all(s.kind == "pn" for s in pn_compiler.sites(converted))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_other_widths(dtype: torch.dtype) -> None:
    net = zoo.torchvision().models.mobilenet_v3_small(weights=None)
    net = randomize_batch_norms(net).to(dtype).eval()
    converted = pn_compiler.transform(net)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    x = IMAGES.to(dtype)
    with torch.no_grad():
        expected = pn_compiler.transform(net.double(), proxy=False)(x.double())
        assert relative_error(converted(x), expected) < {torch.float64: 1e-6}.get(dtype, 0.2)
        assert relative_error(pn_compiler.fold(converted)(x), expected) < {torch.float64: 1e-6}.get(
            dtype, 0.2
        )


def test_structure_alone_on_the_meta_device() -> None:
    with torch.device("meta"):
        net = zoo.torchvision().models.resnet50()
    converted = pn_compiler.transform(net)
    assert {p.device.type for p in converted.parameters()} == {"meta"}
    assert converted(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)
    assert sum(site.kind == "pn" for site in pn_compiler.sites(converted)) == 33


def test_parametrized_consumers_keep_the_function() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3))
    nn.utils.parametrizations.weight_norm(net[2])
    (site,) = pn_compiler.sites(check(net, IMAGES))
    assert site.code == "PN202"


SLICE = {
    "timm": (
        "bat_resnext26ts cspresnet50 dla34 dpn48b efficientformer_l1 efficientnet_x_b3 efficientvit_b0 "
        "fastvit_t8 ghostnet_050 hgnet_tiny hrnet_w18_small inception_v4 levit_128s mobileone_s0 "
        "mobilenetv4_conv_small mobilevit_xxs mobilevitv2_050 nextvit_small repvgg_a0 repvit_m0_9 "
        "res2net50_14w_8s resnest14d rexnet_100 selecsls42b skresnet18 tf_efficientnet_b0 tresnet_m "
        "visformer_tiny vovnet39a xception41"
    ),
    "torchvision": "googlenet inception_v3 mnasnet0_5 s3d raft_large vgg11_bn",
}

# convolutions, BatchNorms and activations one after the other or side by side, as in others of the slice
PLAIN = "dla34 dpn48b hgnet_tiny inception_v3 inception_v4 selecsls42b vovnet39a xception41"


@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(library, name, marks=[pytest.mark.slow] * (name in PLAIN.split()))
        for library, names in SLICE.items()
        for name in names.split()
    ],
)
def test_every_batch_norm_is_accounted_for(library: str, name: str) -> None:
    row = transform_one((library, name))
    assert row is not None
    assert row.get("error") is None, row.get("traceback")
    assert row["unaccounted"] == []
