"""pn_compiler.transform, sites and fold as a user sees them."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError, RefusedError, TraceError, UnsupportedModelError
from pn_compiler.testing import (
    assert_batch_independent,
    assert_same_outputs,
    count_modules,
    randomize_batch_norms,
)
from tests import zoo


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
    actual, expected = converted.double()(IMAGES.double()), normalized_only.double()(IMAGES.double())
    if exact:
        assert_same_outputs(actual, expected, tolerance=1e-6)
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


def test_untouched_names_stay_and_the_caller_keeps_the_model() -> None:
    net = conv_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    converted = pn_compiler.transform(net, norm="layer")
    assert isinstance(converted, fx.GraphModule)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    names = {name for name, _ in net.named_parameters()}
    added = {"1.proxy_weight", "1.proxy_bias", "5.proxy_weight", "5.proxy_bias"}
    assert {name for name, _ in converted.named_parameters()} == names | added
    assert not list(converted.buffers())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@torch.no_grad()
def test_an_untrained_network_takes_the_weights_of_a_trained_one(name: str, norm: str) -> None:
    """Structure depends on the architecture and the options, not on whether BatchNorms were trained."""
    fresh = getattr(zoo.torchvision().models, name)(num_classes=7).eval()
    trained = pn_compiler.transform(randomize_batch_norms(copy.deepcopy(fresh)), norm=norm)
    converted = pn_compiler.transform(fresh, norm=norm)
    assert not any(site.warm_start for site in pn_compiler.sites(converted))
    converted.load_state_dict(trained.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert_same_outputs(converted(x), trained(x), tolerance=1e-6)


def test_deepcopy_pickle_and_state_dict_round_trip() -> None:
    converted = pn_compiler.transform(conv_net())
    expected = converted(IMAGES)
    for again in (copy.deepcopy(converted), copy.deepcopy(pickle.loads(pickle.dumps(converted)))):
        assert torch.equal(again(IMAGES), expected)
        assert pn_compiler.sites(again) == pn_compiler.sites(converted)
        assert not again.training
        assert_same_outputs(pn_compiler.fold(again)(IMAGES), expected)
    other = pn_compiler.transform(conv_net(), norm="rms", warm_start="none")
    # a warm start adds biases where consumers had none: here every consumer has one
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(IMAGES), expected)


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
