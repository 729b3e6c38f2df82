"""Private training with opacus: gradients of each sample, against one backward for each sample alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule, PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pn_compiler
from pn_compiler.base.errors import ConfigError
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.integrations.opacus import prepare, release
from pn_compiler.nn import ChannelAffine, InputAffineConv2d, ProxyNormAct, ProxyStatistics
from pn_compiler.testing import assert_same_outputs, count_modules, randomize_batch_norms
from tests import zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),  # the default of opacus, for experiments
    pytest.mark.filterwarnings(
        "ignore:Full backward hook is firing"
    ),  # any first layer: images need no gradient
]


class SqueezeExcitation(nn.Module):
    """A gate that absorbs scale and shift, and a residual addition that needs them applied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.conv, self.bn2, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn(self.stem(x)))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        z = F.relu(self.bn2(self.conv(y * gate)))
        return self.head((z + y).mean((2, 3)))


class Siamese(nn.Module):
    """Every layer is called twice, on different images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU()
        self.conv2, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, two = (self.conv2(self.act(self.bn(self.conv(half)))) for half in (x, x.flip(3)))
        return self.head((one * two).mean((2, 3)))


class TwoReaders(nn.Module):
    """The affine output of a BatchNorm is read beside its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.head((self.conv2(F.relu(y)) + y).mean((2, 3)))


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.GELU(), nn.Conv1d(4, 6, 3, 2, 2, dilation=2, groups=2),
        nn.BatchNorm1d(6), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def conv2d() -> nn.Module:
    frozen = nn.PReLU(4).requires_grad_(False)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(inplace=True), nn.MaxPool2d(2, padding=1),
        nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False), nn.BatchNorm2d(4), frozen,
        nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), padding_mode="circular"), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), nn.Mish(), nn.Conv3d(4, 4, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(243, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6, bias=False),
        nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "conv1d": (conv1d, 1), "conv2d": (conv2d, 2), "conv3d": (conv3d, 3), "mlp": (mlp, 2),
    "gate": (SqueezeExcitation, 2), "siamese": (Siamese, 2), "two_readers": (TwoReaders, 2),
}  # fmt: skip


def images(dtype: torch.dtype = torch.float64, *, rank: int = 2, size: int = 9, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, *[size] * rank, dtype=dtype, generator=torch.Generator().manual_seed(1))


def converted(network: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """`network`, as if trained, in train mode, with random proxy parameters, and nothing dropped."""
    with torch.no_grad():
        network.eval()(x[:1].float())  # lazy layers
    model = (
        pn_compiler.transform(randomize_batch_norms(network), x[:1].float(), **options).to(x.dtype).train()
    )
    for name, parameter in model.named_parameters():
        if "proxy_" in name:
            nn.init.normal_(parameter, 0, 0.2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients_alone(model: nn.Module, x: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """For each sample: its gradients, from a forward and backward of it alone, without opacus."""
    for module in model.modules():
        if isinstance(module, ProxyStatistics):
            module.enabled = False  # computed together, sites share nodes: another quadrature, off by 1e-10
    result = []
    for one, label in zip(x.split(1), labels.split(1), strict=True):
        model.zero_grad()
        F.cross_entropy(model(one), label).backward()
        result.append({k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad})
    return result


def assert_gradients_of_samples(
    model: nn.Module, x: Tensor, *, tolerance: float, reduction: str = "mean"
) -> None:
    """That the gradients which opacus finds in one batch are those of each sample alone."""
    torch.manual_seed(0)
    labels = torch.randint(5, (len(x),))
    want = gradients_alone(copy.deepcopy(model), x, labels)
    plain = model(x)
    private = GradSampleModule(prepare(model), loss_reduction=reduction)
    out = private(x)
    assert_same_outputs(out, plain, tolerance=tolerance)
    F.cross_entropy(out, labels, reduction=reduction).backward()
    for index, expected in enumerate(want):
        for name, gradient in expected.items():
            actual = model.get_parameter(name).grad_sample[index]
            error = float((actual - gradient).norm() / gradient.norm().clamp_min(1e-12))
            assert error <= tolerance, f"{name}, sample {index}: {error:.1e}"


@pytest.mark.parametrize("warm_start", ["running_stats", "none"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_site_and_consumer(name: str, warm_start: str) -> None:
    torch.manual_seed(0)
    build, rank = NETWORKS[name]
    x = images(rank=rank)
    model = converted(build(), x, warm_start=warm_start)
    assert count_modules(model, ProxyNormAct) or warm_start == "running_stats"
    assert_gradients_of_samples(model, x, tolerance=1e-9, reduction="sum" if name == "conv1d" else "mean")


@pytest.mark.parametrize(
    "options", [{"norm": "rms", "anchor": 0.3}, {"norm": "group", "anchor": 0.5}], ids=str
)
@pytest.mark.parametrize("warm_start", ["running_stats", "none"])
@pytest.mark.parametrize("name", NETWORKS)
def test_anchored_sites(name: str, warm_start: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    build, rank = NETWORKS[name]
    x = images(rank=rank)
    model = converted(build(), x, warm_start=warm_start, **options)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert_gradients_of_samples(model, x, tolerance=1e-9)
    released = release(model).state_dict()
    assert released.keys() == state.keys()
    assert all(torch.equal(released[key], value) for key, value in state.items() if "population" in key)


def test_anchored_networks_train_privately() -> None:
    private, optimizer, loader = make_private(
        prepare(small(norm="rms", anchor=0.5)).train(), poisson_sampling=True
    )
    train(private, optimizer, loader)
    x = images(torch.float32)
    model = release(private).eval()
    assert_same_outputs(pn_compiler.fold(model)(x), model(x))


LAYOUTS: dict[int, list[tuple[int, ...]]] = {
    1: [(2, 0, 1)],
    2: [(0, 2, 3, 1), (3, 2, 1, 0)],
    3: [(0, 2, 3, 4, 1)],
}


@pytest.mark.parametrize(
    "options", [{}, {"groups": 3}, {"dilation": 2, "padding": 1}, {"stride": 2, "bias": False}]
)
@pytest.mark.parametrize("rank", LAYOUTS)
@pytest.mark.parametrize("site", [False, True])
def test_inputs_in_any_order_of_memory(rank: int, options: dict[str, Any], site: bool) -> None:
    """As channels_last or permuted: of the first layer, of a layer of its own, and of a consumer."""
    torch.manual_seed(0)
    conv, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
    first = nn.Sequential(conv(3, 6, 2, **options), norm(6), nn.ReLU() if site else nn.Identity())
    net = nn.Sequential(*first, conv(6, 6, 2, **options), nn.Flatten(), nn.LazyLinear(5))
    x = images(rank=rank)
    model = converted(net, x, warm_start="none")
    for order in LAYOUTS[rank]:
        strided = x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.dim())])
        assert not strided.is_contiguous()
        assert_gradients_of_samples(copy.deepcopy(model), strided, tolerance=1e-9)
        in_order = copy.deepcopy(model)
        if rank == 2:
            in_order = in_order.to(memory_format=torch.channels_last)
            assert_gradients_of_samples(in_order, strided, tolerance=1e-9)


def test_these_networks_have_every_kind_of_module() -> None:
    found = set()
    for build, rank in NETWORKS.values():
        model = converted(build(), images(rank=rank), warm_start="none")
        found |= {type(m).__name__ for m in model.modules()} | {
            f"outputs={m.outputs}" for m in model.modules() if isinstance(m, ProxyNormAct)
        }
    assert found >= {
        "InputAffineConv1d", "InputAffineConv2d", "InputAffineConv3d", "InputAffineLinear", "ChannelAffine",
        "outputs=('activation', 'shift')", "outputs=('activation', 'scale', 'shift')",
        "outputs=('activation', 'scale', 'shift', 'affine')",
    }  # fmt: skip


def with_silu(network: nn.Module) -> nn.Module:
    for name, child in network.named_children():
        if isinstance(child, nn.ReLU):
            setattr(network, name, nn.SiLU(inplace=True))
        with_silu(child)
    return network


REAL = {
    "resnet": lambda: zoo.small("resnet"),
    "resnet with silu": lambda: with_silu(zoo.small("resnet")),
    "mobilenet": lambda: zoo.small("mobilenet"),
    "resnet18": lambda: zoo.torchvision().models.resnet18(num_classes=5),
    "mobilenet_v2": lambda: zoo.torchvision().models.mobilenet_v2(num_classes=5),
}
WHOLE = ("resnet18", "mobilenet_v2")
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in WHOLE else name for name in REAL]


@pytest.mark.parametrize("options", [{}, {"warm_start": "none", "norm": "group"}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_real_networks(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = images(size=32, batch=2)
    model = converted(REAL[name](), x, **options)
    assert ModuleValidator.validate(prepare(model)) == []
    assert_gradients_of_samples(release(model), x, tolerance=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_real_networks_in_float32(name: str) -> None:
    torch.manual_seed(0)
    x = images(torch.float32, size=32, batch=2)
    assert_gradients_of_samples(converted(REAL[name](), x), x, tolerance=1e-5)


# The engine ----------------------------------------------------------------------------------------


def small(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return converted(conv2d(), images(torch.float32), **options)


def batches(count: int = 24) -> DataLoader[Any]:
    labels = torch.randint(5, (count,), generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(images(torch.float32, batch=count), labels), batch_size=8)


def make_private(model: nn.Module, *, noise: float = 0.0, **options: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=batches(),
        noise_multiplier=noise, max_grad_norm=0.5, **options,
    )  # fmt: skip


def train(private: nn.Module, optimizer: Any, loader: Any, criterion: Any = F.cross_entropy) -> None:
    for x, labels in loader:
        optimizer.zero_grad()
        criterion(private(x), labels).backward()
        optimizer.step()


def test_training_folding_and_export(tmp_path: Path) -> None:
    model = small()
    names = list(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    private, optimizer, loader = make_private(prepare(model), noise=1.0)
    for _ in range(3):
        train(private, optimizer, loader)
    trained = release(private)
    assert trained is model
    assert list(trained.state_dict()) == names
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, p in trained.named_parameters() if p.requires_grad}
    x = images(torch.float32)
    fresh = small()
    fresh.load_state_dict(trained.state_dict())
    assert_same_outputs(trained(x), fresh(x))
    assert not any(has_hooks(module) for module in trained.modules())
    folded = pn_compiler.fold(trained)
    assert count_modules(folded, ProxyNormAct, InputAffineConv2d, ChannelAffine) == 0
    assert_same_outputs(folded(x), trained.eval()(x))
    pn_compiler.export_onnx(trained, tmp_path / "m.onnx", x)
    torch.save(trained, tmp_path / "m.pt")
    assert_same_outputs(torch.load(tmp_path / "m.pt", weights_only=False)(x), trained(x))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_folds_while_opacus_holds_it(norm: str) -> None:
    private, *_ = make_private(prepare(small(norm=norm)))
    x = images(torch.float32)
    train(*make_private(prepare(small(norm=norm))))
    private.eval()
    folded = pn_compiler.fold(private._module)
    assert count_modules(folded, ProxyNormAct, InputAffineConv2d, ChannelAffine) == 0
    assert_same_outputs(folded(x), private(x))


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_poisson_batches_of_no_and_one_sample(batch: int, reduction: str) -> None:
    model = small()
    private, optimizer, _ = make_private(prepare(model), noise=1.0, loss_reduction=reduction)
    x, labels = images(torch.float32)[:batch], torch.zeros(batch, dtype=torch.long)
    F.cross_entropy(private(x), labels, reduction=reduction).backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad_sample.shape == (batch, *p.shape), name
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_large_batches_in_parts_give_the_same_step() -> None:
    steps = []
    for largest in (24, 3):
        model = small()
        private, optimizer, loader = make_private(prepare(model), poisson_sampling=False)
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=largest, optimizer=optimizer
        ) as parts:
            train(private, optimizer, parts)
        steps.append(dict(model.state_dict()))
    assert_same_outputs(*steps)


def test_ghost_clipping_gives_the_same_step() -> None:
    steps = []
    for mode in ("hooks", "ghost"):
        model = small()
        options = {"grad_sample_mode": mode, "poisson_sampling": False, "criterion": nn.CrossEntropyLoss()}
        private, optimizer, *criterion, loader = make_private(prepare(model), **options)
        train(private, optimizer, loader, *criterion)
        steps.append(dict(release(private).state_dict()))
    assert_same_outputs(*steps)


@pytest.mark.parametrize("mode", ["functorch", "ew"])
def test_other_modes_are_refused(mode: str) -> None:
    private, optimizer, loader = make_private(prepare(small()), grad_sample_mode=mode, poisson_sampling=False)
    with pytest.raises(ConfigError, match=f"grad_sample_mode='{mode}'.*'hooks' or 'ghost'"):
        train(private, optimizer, loader)


@pytest.mark.parametrize("frozen", ["0.", "1.", "1.proxy", "4.", "4.weight", "5.weight", "7."])
def test_frozen_parts(frozen: str) -> None:
    """A convolution before a site, a site, a part of one, a consumer, a part of one, ..."""
    torch.manual_seed(0)
    x = images()
    model = converted(conv2d(), x)
    names = [name for name, _ in model.named_parameters() if name.startswith(frozen)]
    assert names
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    assert_gradients_of_samples(model, x, tolerance=1e-9)


def test_activations_that_learn_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Conv2d(4, 5, 1))
    model = pn_compiler.transform(randomize_batch_norms(net))
    with pytest.raises(ConfigError, match=r"PReLU that learns.*requires_grad"):
        prepare(model)


def test_unprepared_models_are_refused() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"prepare\(model\) before make_private"):
        make_private(small())


def test_a_network_written_with_the_layer() -> None:
    torch.manual_seed(0)
    x = images()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), ProxyNormAct(2, 4, nn.SiLU()), nn.Flatten(), nn.Linear(196, 5))
    net.double()
    labels = torch.tensor([0, 1, 2])
    want = gradients_alone(copy.deepcopy(net), x, labels)
    with pytest.raises(UnsupportedModuleError, match="prepare"):
        make_private(net)
    private, *_ = make_private(prepare(net))
    F.cross_entropy(private(x), labels).backward()
    for index, expected in enumerate(want):
        for name, gradient in expected.items():
            actual = net.get_parameter(name).grad_sample[index]
            assert_same_outputs(actual, gradient, tolerance=1e-9)


def test_preparing_twice_and_too_late() -> None:
    model = small()
    x = images(torch.float32)
    assert prepare(prepare(model)) is model
    once = prepare(small())
    assert [len(m._forward_hooks) for m in model.modules()] == [len(m._forward_hooks) for m in once.modules()]
    assert_same_outputs(copy.deepcopy(model)(x), once(x))
    private, *_ = make_private(model)
    for late in (private, private._module):
        with pytest.raises(ConfigError, match="before make_private"):
            prepare(late)


@pytest.mark.parametrize("wrapped", [True, False])
def test_channels_last_and_without_a_wrapper(wrapped: bool) -> None:
    torch.manual_seed(0)
    x = images().to(memory_format=torch.channels_last)
    labels = torch.tensor([0, 1, 2])
    model = converted(SqueezeExcitation(), x, warm_start="none").to(memory_format=torch.channels_last)
    want = gradients_alone(copy.deepcopy(model), x, labels)
    private, *_ = make_private(prepare(model), wrap_model=wrapped)
    F.cross_entropy((private if wrapped else model)(x), labels).backward()
    for index, expected in enumerate(want):
        for name in ("bn.weight", "bn.proxy_weight", "bn2.bias", "conv.weight"):
            assert_same_outputs(model.get_parameter(name).grad_sample[index], expected[name], tolerance=1e-9)
    assert release(private) is model
