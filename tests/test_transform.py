"""pn_compiler.transform, sites and fold as a user sees them."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError, RefusedError, TraceError, UnsupportedModelError
from pn_compiler.testing import (
    assert_batch_independent,
    assert_same_outputs,
    count_modules,
    randomize_batch_norms,
)


def conv_net(activation: nn.Module | None = None, **conv: object) -> nn.Sequential:
    """conv - bn - act - pool - conv - bn - act - flatten - linear, trained as far as anyone can tell."""
    torch.manual_seed(0)
    act = activation or nn.ReLU()
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        act,
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, **conv),
        nn.BatchNorm2d(16),
        copy.deepcopy(act),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(16 * 16, 5),
    )
    return randomize_batch_norms(net).eval()  # type: ignore[return-value]


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))

ACTIVATION_MODULES = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.PReLU(), nn.SiLU(inplace=True),
    nn.GELU(), nn.GELU("tanh"), nn.Hardswish(), nn.ELU(), nn.Sigmoid(), nn.Tanh(), nn.Mish(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATION_MODULES, ids=str)
@pytest.mark.parametrize("proxy_padding", ["activation", "output"])
def test_activation_modules_convert_keep_the_function_and_fold(
    activation: nn.Module, proxy_padding: str
) -> None:
    net = conv_net(activation)
    converted = pn_compiler.transform(net, proxy_padding=proxy_padding)
    assert [s.kind for s in pn_compiler.sites(converted)] == ["pn", "pn"]
    assert count_modules(converted, nn.BatchNorm2d) == 0
    normalized_only = pn_compiler.transform(net, proxy=False)
    exact = proxy_padding == "activation"  # the reference's padding is not, at the border
    got, want = converted.double()(IMAGES.double()), normalized_only.double()(IMAGES.double())
    if exact:
        assert_same_outputs(got, want, tolerance=1e-6)
    scratch = pn_compiler.transform(net, proxy_padding=proxy_padding, warm_start="none").double()
    randomize_proxies(scratch)
    for model in (converted, scratch):
        folded = pn_compiler.fold(model)
        assert count_modules(folded, pn_compiler.nn.ProxyNormAct) == 0
        assert_same_outputs(folded(IMAGES.double()), model(IMAGES.double()), tolerance=1e-9)
        assert_batch_independent(folded, IMAGES.double())


def randomize_proxies(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proxy" in name:
                parameter.normal_(0, 0.3)


class Spelled(nn.Module):
    """One site whose activation is a function or method."""

    def __init__(self, spell: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)
        self.spell = spell

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.spell(self.bn(self.conv1(x))))


SPELLINGS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "F.relu": ("relu", F.relu),
    "F.relu inplace": ("relu", lambda x: F.relu(x, inplace=True)),
    "F.relu_": ("relu", F.relu_),
    "torch.relu": ("relu", torch.relu),
    "x.relu": ("relu", lambda x: x.relu()),
    "x.relu_": ("relu", lambda x: x.relu_()),
    "x.clamp(min=0)": ("relu", lambda x: x.clamp(min=0)),
    "torch.clamp(0, 6)": ("relu6", lambda x: torch.clamp(x, 0, 6)),
    "F.relu6": ("relu6", F.relu6),
    "F.hardtanh": ("hardtanh", lambda x: F.hardtanh(x, -1, 2)),
    "F.leaky_relu": ("leakyrelu", lambda x: F.leaky_relu(x, 0.2)),
    "F.leaky_relu keyword": ("leakyrelu", lambda x: F.leaky_relu(x, negative_slope=0.2)),
    "F.silu": ("silu", F.silu),
    "F.gelu": ("gelu", F.gelu),
    "F.gelu tanh": ("gelu", lambda x: F.gelu(x, approximate="tanh")),
    "F.hardswish": ("hardswish", F.hardswish),
    "F.elu": ("elu", lambda x: F.elu(x, 0.5)),
    "torch.sigmoid": ("sigmoid", torch.sigmoid),
    "x.sigmoid": ("sigmoid", lambda x: x.sigmoid()),
    "x.tanh_": ("tanh", lambda x: x.tanh_()),
    "F.mish": ("mish", F.mish),
    "F.softplus": ("softplus", F.softplus),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_functions_and_methods_are_recognised(name: str) -> None:
    activation, spell = SPELLINGS[name]
    net = randomize_batch_norms(Spelled(spell)).eval()
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert (site.name, site.kind, site.activation) == ("bn", "pn", activation)
    want = pn_compiler.transform(net, proxy=False)(IMAGES)
    assert_same_outputs(converted(IMAGES), want)
    assert_same_outputs(pn_compiler.fold(converted)(IMAGES), want)


def test_an_activation_with_computed_bounds_is_none() -> None:
    net = randomize_batch_norms(Spelled(lambda x: torch.clamp(x, 0, x.mean()))).eval()
    (site,) = pn_compiler.sites(pn_compiler.transform(net))
    assert (site.kind, site.code) == ("norm_only", "PN201")


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("warm_start", ["auto", "running_stats", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrix_of_ranks_biases_affines_and_dtypes(
    rank: int, conv_bias: bool, affine: bool, warm_start: str, dtype: torch.dtype
) -> None:
    conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[
        rank - 1
    ]
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(3, 8, 3, padding=1, bias=conv_bias),
        norm(8, eps=1e-3, affine=affine),
        nn.ReLU(),
        conv(8, 4, 3, padding=1, bias=conv_bias),
    )
    net = randomize_batch_norms(net).to(dtype).eval()
    x = torch.randn(2, 3, *[6] * rank, dtype=dtype)
    converted = pn_compiler.transform(net, warm_start=warm_start)
    site = converted.get_submodule("1")
    assert isinstance(site, pn_compiler.nn.ProxyNormAct)
    assert site.eps == 1e-3
    assert site.weight.dtype == dtype
    assert site.weight.requires_grad is affine
    assert_same_outputs(pn_compiler.fold(converted)(x), converted(x))
    if warm_start != "none":
        want = pn_compiler.transform(net, warm_start=warm_start, proxy=False)(x)
        assert_same_outputs(converted(x), want, tolerance=1e-5)


def test_untouched_names_stay_and_the_caller_keeps_the_model() -> None:
    net = conv_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    converted = pn_compiler.transform(net)
    assert isinstance(converted, fx.GraphModule)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    names = {name for name, _ in net.named_parameters()}
    added = {"1.proxy_weight", "1.proxy_bias", "5.proxy_weight", "5.proxy_bias"}
    assert {name for name, _ in converted.named_parameters()} == names | added
    assert not list(converted.buffers())


def test_deepcopy_pickle_and_state_dict_round_trip() -> None:
    converted = pn_compiler.transform(conv_net())
    want = converted(IMAGES)
    for again in (copy.deepcopy(converted), copy.deepcopy(pickle.loads(pickle.dumps(converted)))):
        assert torch.equal(again(IMAGES), want)
        assert pn_compiler.sites(again) == pn_compiler.sites(converted)
        assert not again.training
        assert_same_outputs(pn_compiler.fold(again)(IMAGES), want)
    other = pn_compiler.transform(conv_net(), warm_start="none")
    # a warm start adds biases where consumers had none: here every consumer has one
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(IMAGES), want)


def test_trains_at_batch_size_one_and_keeps_modes() -> None:
    net = conv_net(nn.SiLU()).train()
    converted = pn_compiler.transform(net)
    assert converted.training
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.01)
    before = copy.deepcopy(converted.state_dict())
    F.cross_entropy(converted(IMAGES[:1]), torch.tensor([2])).backward()
    for name, parameter in converted.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    optimizer.step()
    assert all(not torch.equal(before[k], v) for k, v in converted.state_dict().items() if "bias" in k)
    converted.train()
    assert not torch.equal(converted(IMAGES), converted(IMAGES))  # dropout
    converted.eval()
    assert torch.equal(converted(IMAGES), converted(IMAGES))


def test_functional_dropout_follows_train_and_eval() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, training=self.training)

    converted = pn_compiler.transform(randomize_batch_norms(Net()).eval())
    for model in (converted, pickle.loads(pickle.dumps(converted))):
        assert torch.equal(model(IMAGES), model(IMAGES))
        model.train()
        assert not torch.equal(model(IMAGES), model(IMAGES))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    converted = pn_compiler.transform(wrap(conv_net()))
    assert [(s.name, s.kind) for s in pn_compiler.sites(converted)] == [("1", "pn"), ("5", "pn")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own
def test_torchscript_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(UnsupportedModelError, match="TorchScript"):
        pn_compiler.transform(scripted)


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


class TwoReaders(nn.Module):
    """The activation and a convolution both read the BatchNorm."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.act = activation
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return self.conv1(self.act(y)) * self.conv2(y)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU()], ids=str)
@pytest.mark.parametrize("options", [{}, {"proxy_padding": "output"}, {"warm_start": "none"}], ids=str)
def test_other_readers_keep_the_affine_output(activation: nn.Module, options: dict[str, str]) -> None:
    net = randomize_batch_norms(TwoReaders(activation)).eval().double()
    x = IMAGES.double()
    converted = pn_compiler.transform(net, **options)
    (site,) = pn_compiler.sites(converted)
    assert site.kind == "pn"
    assert_same_outputs(pn_compiler.fold(converted)(x), converted(x), tolerance=1e-9)
    if not options:
        assert_same_outputs(converted(x), pn_compiler.transform(net, proxy=False)(x), tolerance=1e-9)


class Residual(nn.Module):
    """bn - act feeds a convolution and an addition, the first site of a ResNet v1."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.act = activation
        self.pool = nn.MaxPool2d(2)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.act(self.bn(x)))
        return y + self.conv(y)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.LeakyReLU()], ids=str)
@pytest.mark.parametrize("proxy_padding", ["activation", "output"])
def test_a_consumer_that_cannot_absorb(activation: nn.Module, proxy_padding: str) -> None:
    net = randomize_batch_norms(Residual(activation)).eval()
    (site,) = pn_compiler.sites(pn_compiler.transform(net, proxy_padding=proxy_padding))
    assert (site.kind, site.code) == ("norm_only", "PN202")
    assert "add" in site.reason
    scratch = pn_compiler.transform(net, warm_start="none", proxy_padding=proxy_padding).double()
    (site,) = pn_compiler.sites(scratch)
    assert site.kind == "pn"
    randomize_proxies(scratch)
    x = IMAGES.double()
    assert_same_outputs(pn_compiler.fold(scratch)(x), scratch(x), tolerance=1e-9)
    assert_same_outputs(scratch(x), residual_reference(scratch, x, proxy_padding), tolerance=1e-9)


def residual_reference(model: nn.Module, x: Tensor, proxy_padding: str) -> Tensor:
    """`Residual` with proxy normalization, by hand."""
    site = copy.deepcopy(model.get_submodule("bn"))
    assert isinstance(site, pn_compiler.nn.ProxyNormAct)
    site.outputs = ("output",)
    conv = model.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    z = F.max_pool2d(site(x), 2)
    padded = F.pad(z, (1, 1, 1, 1))
    if proxy_padding == "activation":  # a padded pixel is an activation of 0, which is v after the affine
        _, shift = site.scale_and_shift()
        inside = F.pad(torch.ones_like(z), (1, 1, 1, 1))
        padded = padded + (1 - inside) * shift.view(-1, 1, 1)
    return z + F.conv2d(padded, conv.weight, conv.bias)


def test_shared_modules_stay_shared() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.conv3 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.bn = nn.BatchNorm2d(3)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.bn(self.conv1(x)))
            x = self.relu(self.bn(self.conv2(x)))
            return self.conv3(x)

    net = randomize_batch_norms(Net()).eval()
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert site.kind == "pn"
    assert count_modules(converted, pn_compiler.nn.ProxyNormAct) == 1
    want = pn_compiler.transform(net, proxy=False)(IMAGES)
    assert_same_outputs(converted(IMAGES), want)
    assert_same_outputs(pn_compiler.fold(converted)(IMAGES), want)


def test_a_convolution_shared_by_two_sites_is_no_absorber() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.head = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.bn1(x))) + self.head(F.relu(self.bn2(x)))

    net = randomize_batch_norms(Net()).eval()
    converted = pn_compiler.transform(net)
    assert {s.code for s in pn_compiler.sites(converted)} == {"PN202"}
    assert_same_outputs(converted(IMAGES), pn_compiler.transform(net, proxy=False)(IMAGES))


def test_tied_weights_are_not_compensated() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.conv, self.twin = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.twin.weight = self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.twin(self.conv(F.relu(self.bn(x))))

    net = randomize_batch_norms(Net()).eval()
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert site.code == "PN202"
    assert "shares its weight" in site.reason
    assert_same_outputs(converted(IMAGES), pn_compiler.transform(net, proxy=False)(IMAGES))


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


def test_a_linear_layer_over_the_last_axis_absorbs_nothing() -> None:
    net = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    net = randomize_batch_norms(net).eval()
    (site,) = pn_compiler.sites(pn_compiler.transform(net))
    assert site.code == "PN202"
    assert "last axis" in site.reason


def test_groups_that_do_not_divide_are_reported() -> None:
    converted = pn_compiler.transform(conv_net(), num_groups=12)
    assert [(s.num_groups, s.code) for s in pn_compiler.sites(converted)] == [(4, "PN205")] * 2
    with pytest.raises(RefusedError, match="PN205 1: 12 groups do not divide 8 channels"):
        pn_compiler.transform(conv_net(), num_groups=12, strict=True)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_every_refusal_is_reported_by_name() -> None:
    class FrozenBatchNorm2d(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    class Custom(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.running_mean.sum()

    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.batch_norm(x, self.bn.running_mean, self.bn.running_var)
            return y if x.sum() > 0 else x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.opaque = Opaque()
            self.unused = nn.BatchNorm2d(3)
            self.frozen = FrozenBatchNorm2d()
            self.stateless = nn.BatchNorm2d(3, track_running_stats=False)
            self.custom = Custom(3)
            self.hooked = nn.BatchNorm2d(3)
            self.hooked.register_forward_hook(lambda *_: None)
            self.broken = nn.BatchNorm2d(3)
            nn.init.constant_(self.broken.running_var, float("nan"))
            self.own = nn.Parameter(torch.ones(3))
            self.bn = nn.BatchNorm2d(3)
            scripted = nn.Sequential(nn.BatchNorm2d(3)).eval()
            self.scripted = torch.jit.trace(scripted, torch.ones(1, 3, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.scripted(x)
            x = self.broken(self.hooked(self.custom(self.stateless(self.frozen(self.opaque(x))))))
            x = F.batch_norm(x, self.own, self.own, training=True)
            return self.bn(x)

    net = Net()
    converted = pn_compiler.transform(net)
    codes = {site.name: site.code for site in pn_compiler.sites(converted)}
    functional = codes.popitem()
    assert functional == ("batch_norm", "PN106")
    assert codes == {
        "opaque.bn": "PN101", "unused": "PN102", "frozen": "PN103", "stateless": "PN104",
        "custom": "PN105", "hooked": "PN108", "broken": "PN109", "bn": "PN201",
        "scripted.0": "PN111",
    }  # fmt: skip
    with pytest.raises(RefusedError) as caught:
        pn_compiler.transform(net, strict=True)
    assert all(f"{code} " in str(caught.value) for code in codes.values() if code != "PN201")


def test_without_running_statistics_only_from_scratch() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Conv2d(3, 2, 1))
    (site,) = pn_compiler.sites(pn_compiler.transform(net, warm_start="none"))
    assert site.kind == "pn"


def test_untrained_norms_start_plain_and_get_proxy_normalization_everywhere() -> None:
    net = Residual(nn.ReLU())
    converted = pn_compiler.transform(net)
    (site,) = pn_compiler.sites(converted)
    assert (site.kind, site.warm_start) == ("pn", False)
    assert torch.equal(converted.get_parameter("bn.weight"), torch.ones(3))


def test_norm_only_bias_can_go() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nn.init.ones_(net[1].bias)
    kept = pn_compiler.transform(net).get_parameter("1.bias")
    dropped = pn_compiler.transform(net, norm_only_bias=False).get_parameter("1.bias")
    assert kept.requires_grad
    assert (kept == 1).all()
    assert not dropped.requires_grad
    assert (dropped == 0).all()


def test_frozen_parameters_stay_frozen() -> None:
    net = conv_net()
    for parameter in net[1].parameters():
        parameter.requires_grad_(False)
    converted = pn_compiler.transform(net)
    assert not any(p.requires_grad for p in converted.get_submodule("1").parameters())
    assert all(p.requires_grad for p in converted.get_submodule("5").parameters())


def test_without_batch_norm_it_passes_through_with_a_note() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    converted = pn_compiler.transform(net)
    assert pn_compiler.sites(converted) == ()
    assert {note.code for note in pn_compiler.notes(converted)} == {"PN100", "PN211"}
    assert torch.equal(converted(IMAGES), net(IMAGES))


def test_refusals_of_whole_models() -> None:
    class Untraceable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="Untraceable"):
        pn_compiler.transform(Untraceable())
    with pytest.raises(UnsupportedModelError, match="0 is an uninitialised LazyBatchNorm2d"):
        pn_compiler.transform(nn.Sequential(nn.LazyBatchNorm2d()))
    with pytest.raises(ConfigError, match="already converted"):
        pn_compiler.transform(pn_compiler.transform(conv_net()))
    with pytest.raises(ConfigError, match="not a result of"):
        pn_compiler.sites(conv_net())


def test_defaults_of_forward_keep_their_meaning() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = F.relu(self.bn(x))
            return x if mask is None else x * mask

    net = randomize_batch_norms(Net()).eval()
    assert_same_outputs(pn_compiler.transform(net)(IMAGES), pn_compiler.transform(net, proxy=False)(IMAGES))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU()], ids=str)
def test_networks_written_with_the_layer_fold(activation: nn.Module) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        pn_compiler.nn.ProxyNormAct(2, 8, activation),
        nn.Conv2d(8, 8, 3),
        pn_compiler.nn.ProxyNormAct(1, 8, activation),
        nn.Conv2d(8, 4, 3, padding=1),
    ).double()
    randomize_proxies(net)
    folded = pn_compiler.fold(net)
    assert count_modules(folded, pn_compiler.nn.ProxyNormAct) == 0
    assert_same_outputs(folded(IMAGES.double()), net(IMAGES.double()), tolerance=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(2, 12),
    size=st.integers(3, 9),
    batch=st.integers(1, 4),
    padding=st.integers(0, 2),
    kernel=st.sampled_from([1, 3]),
    groups=st.sampled_from([None, 1, 2, 3]),
    activation=st.sampled_from([nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish()]),
    pool=st.sampled_from(
        [nn.Identity(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(2)]
    ),
    proxy_padding=st.sampled_from(["activation", "output"]),
    seed=st.integers(0, 2**16),
)
def test_folding_is_exact_for_odd_shapes(
    channels: int, size: int, batch: int, padding: int, kernel: int, groups: int | None,
    activation: nn.Module, pool: nn.Module, proxy_padding: str, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.BatchNorm2d(channels), activation, pool, nn.Conv2d(channels, 3, kernel, padding=padding + 1)
    )
    net = randomize_batch_norms(net, seed).double().eval()
    x = torch.randn(batch, channels, size, size, dtype=torch.float64)
    warm = pn_compiler.transform(net, num_groups=groups, proxy_padding=proxy_padding)
    if proxy_padding == "activation":
        plain = pn_compiler.transform(net, num_groups=groups, proxy=False)
        assert_same_outputs(warm(x), plain(x), tolerance=1e-9)
    scratch = pn_compiler.transform(net, num_groups=groups, proxy_padding=proxy_padding, warm_start="none")
    randomize_proxies(scratch)
    for model in (warm, scratch):
        assert_same_outputs(pn_compiler.fold(model)(x), model(x), tolerance=1e-9)
