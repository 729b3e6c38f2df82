"""norm="rms" and anchor= from end to end, against BatchNorm networks that are converted by hand."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import pn_compiler
from pn_compiler.base.config import DEFAULT_ANCHOR, TransformConfig
from pn_compiler.base.errors import ConfigError
from pn_compiler.nn import AnchoredNorm, FoldedNorm, FunctionalAnchoredNorm, Normalizer
from pn_compiler.testing import (
    assert_batch_independent,
    assert_same_outputs,
    count_modules,
    randomize_batch_norms,
    relative_error,
)
from tests import zoo

OPTIONS: list[dict[str, Any]] = [
    {"norm": "rms"},
    {"norm": "rms", "anchor": 0.4},
    {"norm": "rms", "num_groups": 2, "anchor": 0.4},
    {"norm": "rms", "anchor": 1.0},
    {"norm": "layer", "anchor": 0.4},
    {"norm": "layer", "anchor": 1.0},
    {"num_groups": 2, "anchor": 0.4},
    {"norm": "instance", "anchor": 0.4},
]
IMAGES = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3


class ByHand(nn.Module):
    """A trained BatchNorm, converted: the formulas of docs/method.md, channel by channel."""

    def __init__(self, norm: _BatchNorm, groups: int, anchor: float, *, rms: bool) -> None:
        super().__init__()
        self.norm, self.groups, self.anchor, self.rms = norm, groups, anchor, rms

    def forward(self, x: Tensor) -> Tensor:
        norm, size = self.norm, x.shape[1] // self.groups
        result = torch.empty_like(x)
        for g in range(self.groups):
            own = slice(g * size, (g + 1) * size)
            mu, var, part = norm.running_mean[own], norm.running_var[own], x[:, own]
            mean = mu.mean()
            spread = (var + mu**2).mean() - mean**2
            axes = tuple(range(1, x.dim()))
            center = mean if self.rms else part.mean(axes, keepdim=True)
            own_spread = ((part - center) ** 2).mean(axes, keepdim=True)
            y = (part - center) / ((1 - self.anchor) * own_spread + self.anchor * spread + norm.eps).sqrt()
            sd = (var + norm.eps).sqrt()
            weight = norm.weight[own] * (spread + norm.eps).sqrt() / sd
            bias = norm.bias[own] + norm.weight[own] * (mean - mu) / sd
            column = (-1, *[1] * (x.dim() - 2))
            result[:, own] = y * weight.view(column) + bias.view(column)
        return result


def by_hand(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    model = copy.deepcopy(model)
    config = TransformConfig(**options)
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            groups = config.groups_for(module.num_features)
            model.set_submodule(
                name, ByHand(module, groups, config.anchor_for(name, warm=True), rms=config.norm == "rms")
            )
    return model


class Residual(nn.Module):
    """Sites with and without an activation, a residual addition, a shared BatchNorm, no layer in front."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.stem, self.bn1 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act = act or nn.SiLU()
        self.conv, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.shared, self.down = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, 2, groups=2)
        self.bn3, self.head, self.bn4 = nn.BatchNorm2d(6), nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.stem(self.first(x))))
        x = F.relu(self.bn2(self.conv(x)) + x)
        x = F.relu(self.shared(self.down_twice(x)))
        return self.bn4(self.head(F.relu(self.bn3(self.down(x))).mean((2, 3))))

    def down_twice(self, x: Tensor) -> Tensor:
        return self.shared(F.max_pool2d(x, 2, 1))


def network(act: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(Residual(act)).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_conversion_and_fold_are_what_the_formulas_say(options: dict[str, Any]) -> None:
    model = network()
    converted = pn_compiler.transform(model, IMAGES, **options)
    expected = by_hand(model, options | ({"num_groups": None} if options.get("norm") == "instance" else {}))
    if options.get("norm") == "instance":  # [N, C] inputs are normalized over C
        expected.bn4.groups = 1
    assert_same_outputs(converted(IMAGES), expected(IMAGES), tolerance=1e-9)
    assert_batch_independent(converted, IMAGES)
    folded = pn_compiler.fold(converted)
    assert_same_outputs(folded(IMAGES), expected(IMAGES), tolerance=1e-9)
    assert not [m for m in folded.modules() if isinstance(m, Normalizer)]


@torch.no_grad()
@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.PReLU(), nn.GELU(), nn.Tanh()], ids=str
)
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_activations_in_and_out_of_place(act: nn.Module, options: dict[str, Any]) -> None:
    model = network(act)
    converted = pn_compiler.transform(model, IMAGES, **options)
    assert any(site.kind == "pn" for site in pn_compiler.sites(converted))
    expected = by_hand(model, options)(IMAGES)
    assert_same_outputs(converted(IMAGES), expected, tolerance=1e-9)
    assert_same_outputs(pn_compiler.fold(converted)(IMAGES), expected, tolerance=1e-9)


@torch.no_grad()
def test_rms_with_an_anchor_of_1_is_the_network_as_it_was() -> None:
    model = network()
    converted = pn_compiler.transform(model, IMAGES, norm="rms", anchor=1)
    assert_same_outputs(converted(IMAGES), model(IMAGES))
    folded = pn_compiler.fold(converted)
    assert_same_outputs(folded(IMAGES), model(IMAGES))
    assert count_modules(folded, FoldedNorm, nn.GroupNorm) == 0


@torch.no_grad()
def test_one_group_with_an_anchor_folds_into_a_group_norm() -> None:
    folded = pn_compiler.fold(pn_compiler.transform(network(), IMAGES, norm="layer", anchor=0.5))
    assert count_modules(folded, nn.GroupNorm) > 0
    assert count_modules(folded, FoldedNorm) == 0


def test_the_mean_goes_into_the_layer_before() -> None:
    folded = pn_compiler.fold(pn_compiler.transform(network(), IMAGES, norm="rms", anchor=0.5))
    left = [name for name, m in folded.named_modules() if isinstance(m, FoldedNorm) and m.shift is not None]
    assert left == ["first", "shared"]  # an input, and two callers


def test_a_mapping_anchors_each_site_on_its_own() -> None:
    model, anchors = network(), {"bn1": 0.25, "bn3": 1.0}
    for norm in ("rms", "layer"):
        options = {"norm": norm, "anchor": anchors}
        converted = pn_compiler.transform(model, IMAGES, **options)
        assert {s.name: s.anchor for s in pn_compiler.sites(converted) if s.anchor} == anchors
        with torch.no_grad():
            assert_same_outputs(converted(IMAGES), by_hand(model, options)(IMAGES), tolerance=1e-9)


def test_sites_say_norm_and_anchor() -> None:
    (site,) = pn_compiler.sites(pn_compiler.transform(chain(), norm="rms", anchor=0.5))
    assert (site.norm, site.num_groups, site.anchor, site.warm_start) == ("rms", 1, 0.5, True)
    (site,) = pn_compiler.sites(pn_compiler.transform(chain()))
    assert (site.norm, site.anchor) == ("rms", DEFAULT_ANCHOR)
    for cold in ({"norm": "layer"}, {"warm_start": "none"}):
        (site,) = pn_compiler.sites(pn_compiler.transform(chain(), **cold))
        assert (site.norm, site.anchor) == ("layer", 0)


def chain(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 16, 1)
    model = nn.Sequential(*layers)
    return randomize_batch_norms(model).double().eval()


def test_a_cold_start_has_the_statistics_of_an_untrained_batch_norm() -> None:
    model = chain()
    for anchor in (0.0, 0.5):
        cold = pn_compiler.transform(model, norm="rms", anchor=anchor, warm_start="none", proxy=False)
        site = cold.get_submodule("1")
        assert isinstance(site, AnchoredNorm)
        assert (float(site.population_mean), float(site.population_var)) == (0, 1)
        assert float(site.anchor) == anchor
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
        square = (x**2).mean((1, 2, 3), keepdim=True)
        y = x / ((1 - anchor) * square + anchor + site.eps).sqrt()
        norm = model[1]
        assert_same_outputs(site(x), y * norm.weight.view(4, 1, 1) + norm.bias.view(4, 1, 1))


@pytest.mark.parametrize("options", OPTIONS[:6], ids=str)
def test_state_dict_pickle_and_copies(options: dict[str, Any]) -> None:
    converted = pn_compiler.transform(network(), IMAGES, **options)
    fresh = pn_compiler.transform(Residual().double(), IMAGES, **options, warm_start="running_stats")
    fresh.eval().load_state_dict(converted.state_dict())
    for other in (fresh, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert_same_outputs(other(IMAGES), converted(IMAGES))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_other_checkpoints_convert(options: dict[str, Any]) -> None:
    converted = pn_compiler.transform(network(), IMAGES, **options)
    other = randomize_batch_norms(network(), seed=5)
    expected = pn_compiler.transform(other, IMAGES, **options)
    converted.load_state_dict(pn_compiler.convert_state_dict(other.state_dict(), converted))
    assert_same_outputs(converted(IMAGES), expected(IMAGES))


def test_a_model_without_values_keeps_its_structure() -> None:
    with torch.device("meta"):
        model = Residual().double().eval()
    options = {"norm": "rms", "anchor": 0.5, "warm_start": "running_stats"}
    shell = pn_compiler.transform(model, torch.empty_like(IMAGES, device="meta"), **options)
    filled = pn_compiler.transform(network(), IMAGES, **options)
    shell.load_state_dict(filled.state_dict(), assign=True)
    assert_same_outputs(shell(IMAGES), filled(IMAGES))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_files_compute_the_same_for_any_batch(options: dict[str, Any], tmp_path: Path) -> None:
    model = network().float()
    converted = pn_compiler.transform(model, IMAGES.float(), **options)
    report = pn_compiler.export_onnx(converted, tmp_path / "m.onnx", IMAGES[:1].float())
    assert max(check.error for check in report.checks) < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    expected = by_hand(network(), options)
    if options.get("norm") == "instance":
        expected.bn4.groups = 1
    with torch.no_grad():
        for batch in (1, 3):
            (actual,) = session.run(None, {"x": IMAGES[:batch].float().numpy()})
            assert_same_outputs(torch.from_numpy(np.asarray(actual)), expected(IMAGES[:batch]))


@pytest.mark.parametrize("target", ["ort-cpu", "openvino", "cuda", "tensorrt"])
@pytest.mark.parametrize("num_groups", [None, 2])
def test_all_targets_are_verified(target: Any, num_groups: int | None, tmp_path: Path) -> None:
    model = chain(32).float()
    converted = pn_compiler.transform(model, norm="rms", num_groups=num_groups, anchor=0.4)
    report = pn_compiler.export_onnx(converted, tmp_path / "m.onnx", IMAGES[:1].float(), target=target)
    assert max(check.error for check in report.checks) < 1e-5
    assert report.blocked == (target == "ort-cpu")


def test_files_in_half_precision_normalize_in_float32(tmp_path: Path) -> None:
    model = chain()
    with torch.no_grad():
        model[0].weight.mul_(1e4)  # squares are beyond float16
        model[1].running_var.mul_(1e8)
        model[1].running_mean.mul_(1e4)
    converted = pn_compiler.transform(model.float(), norm="rms", anchor=0.4)
    pn_compiler.export_onnx(converted, tmp_path / "m.onnx", IMAGES[:1].float(), dtype="float16")


def test_constants_replace_anchored_normalizers() -> None:
    for norm in ("rms", "instance"):
        converted = pn_compiler.transform(network(), IMAGES, norm=norm, anchor=0.9)
        frozen, report = pn_compiler.freeze_statistics(converted, [IMAGES, IMAGES.flip(3)], budget=None)
        assert all(row.frozen for row in report.sites)
        assert count_modules(frozen, nn.GroupNorm, FoldedNorm) == 0
        assert_same_outputs(frozen(IMAGES), converted(IMAGES), tolerance=0.5)


def test_calibration_fits_weight_and_bias() -> None:
    model = network()
    plain = pn_compiler.transform(model, IMAGES, norm="rms", anchor=0.5)
    fitted = pn_compiler.transform(
        model, norm="rms", anchor=0.5, warm_start="calibrate", calibration=[IMAGES]
    )
    with torch.no_grad():
        errors = [relative_error(m(IMAGES), model(IMAGES)) for m in (plain, fitted)]
    assert errors[1] < errors[0]
    assert torch.equal(plain.bn1.population_var, fitted.bn1.population_var)


def test_distillation_trains_an_anchored_network() -> None:
    model = network().float()
    converted = pn_compiler.transform(model, IMAGES.float(), norm="rms", anchor=0.5)
    images = torch.randn(40, 3, 9, 9, generator=torch.Generator().manual_seed(2)) + 0.3
    distilled, report = pn_compiler.distill(converted, model, images.split(8), steps=20, batch_size=8)
    assert report.loss_after < report.loss_before
    before = dict(converted.named_buffers())
    assert before.keys() == dict(distilled.named_buffers()).keys()
    for name, buffer in distilled.named_buffers():
        assert torch.equal(buffer, before[name]), name  # population and anchor
    assert_same_outputs(pn_compiler.fold(distilled.eval())(IMAGES.float()), distilled(IMAGES.float()))


class Part(nn.Module):
    """Calls one BatchNorm as a module, and one as a function of its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.bn1(self.conv1(x))))
        return F.batch_norm(
            x, self.bn2.running_mean, self.bn2.running_var, self.bn2.weight, self.bn2.bias, eps=self.bn2.eps
        )


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.conv, self.bn3 = Part(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn3(self.conv(self.part(x)))).mean((2, 3))


class PartByHand(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[2], OPTIONS[4]], ids=str)
def test_code_that_is_not_traced_calls_anchored_norms(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomize_batch_norms(Whole()).double().eval()
    converted = pn_compiler.transform(model, IMAGES, leaves=["part"], **options)
    assert type(converted.get_submodule("part.bn1")) is AnchoredNorm
    assert type(converted.get_submodule("part.bn2")) is FunctionalAnchoredNorm
    plain = copy.deepcopy(model)
    plain.part.__class__ = PartByHand
    expected = by_hand(plain, options)
    with torch.no_grad():
        assert_same_outputs(converted(IMAGES), expected(IMAGES), tolerance=1e-9)
        assert_same_outputs(pn_compiler.fold(converted)(IMAGES), expected(IMAGES), tolerance=1e-9)
    path = tmp_path / "m.onnx"
    pn_compiler.export_onnx(converted.float(), path, IMAGES[:1].float(), input_names=["x"])
    (actual,) = onnxruntime.InferenceSession(path).run(None, {"x": IMAGES.float().numpy()})
    with torch.no_grad():
        assert_same_outputs(torch.from_numpy(np.asarray(actual)), expected(IMAGES))


def test_diagnosis_normalizes_as_the_site_does() -> None:
    converted = pn_compiler.transform(chain(), norm="rms", anchor=0.3, proxy=False)
    (row,) = pn_compiler.diagnose(converted, [IMAGES]).sites
    seen: list[Tensor] = []
    site = converted.get_submodule("1")
    site.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        converted(IMAGES)
    y = site.normalize(seen[0])
    assert row.kind.startswith("RMS")
    assert row.p1 + row.p2 + row.p3 + row.p4 == pytest.approx(float((y**2).mean()))


def test_one_value_needs_an_anchor_of_1() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1), nn.Linear(1, 2))
    model = randomize_batch_norms(model).double().eval()
    x = IMAGES[:, :, 0, 0]
    for anchor in (0.0, 0.9):
        (site,) = pn_compiler.sites(pn_compiler.transform(model, x, norm="rms", anchor=anchor))
        assert (site.kind, site.code) == ("skipped", "PN107")
    frozen = pn_compiler.transform(model, x, norm="rms", anchor=1.0)
    assert [site.kind for site in pn_compiler.sites(frozen)] == ["norm_only"]
    assert_same_outputs(frozen(x), model(x))
    (site,) = pn_compiler.sites(pn_compiler.transform(model, x, norm="layer", anchor=1.0))
    assert site.code == "PN107"  # less its own mean, it is 0


@pytest.mark.parametrize("anchor", [-0.1, 1.1, float("nan"), "0.5", True, {"bn1": 2}, {3: 0.5}], ids=str)
def test_impossible_anchors_are_errors(anchor: Any) -> None:
    with pytest.raises(ConfigError, match="anchor"):
        pn_compiler.transform(network(), IMAGES, anchor=anchor)


def test_an_anchor_for_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"anchor names nowhere\.bn: .*bn1"):
        pn_compiler.transform(network(), IMAGES, anchor={"nowhere.bn": 0.5, "bn1": 0.1})


@torch.no_grad()
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[2], OPTIONS[4]], ids=str)
@pytest.mark.parametrize("name", ["torchvision resnet18", "timm mobilenetv3"])
def test_real_networks(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    if name.startswith("timm"):
        model = zoo.timm().create_model("mobilenetv3_small_050", num_classes=7)
    else:
        model = zoo.torchvision().models.resnet18(num_classes=7)
    model = randomize_batch_norms(model).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    converted = pn_compiler.transform(model, **options)
    assert_same_outputs(converted(x), _fused_by_hand(model, options)(x), tolerance=1e-8)
    assert_same_outputs(pn_compiler.fold(converted)(x), converted(x), tolerance=1e-8)


def _fused_by_hand(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """`by_hand`, for timm's BatchNorms with an activation inside, too."""
    model = copy.deepcopy(model)
    config = TransformConfig(**options)
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            new: nn.Module = ByHand(
                module,
                config.groups_for(module.num_features),
                config.anchor_for(name, warm=True),
                rms=config.norm == "rms",
            )
            act = getattr(module, "act", None)
            model.set_submodule(name, new if act is None else nn.Sequential(new, act))
    return model
