"""batch_norm as a function in code that stays whole: converted where it is safe, else named."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pn_compiler
from benchmarks.fuzz.reference import ByHand
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
NORMALIZER = ("weight", "bias", "population_mean", "population_var", "anchor")


class Two(nn.Module):
    """Two BatchNorms behind something that no graph can hold."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(3)
        self.before = before


class Direct(Two):
    """Calls batch_norm with the tensors of one of them, under another name."""

    def forward(self, x: Any) -> Any:
        x = self.conv(self.other(self.before(x)))
        bn = self.bn
        return F.relu(
            F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps)
        )


class Named(Two):
    """Calls batch_norm with the tensors of one of them."""

    def forward(self, x: Any) -> Any:
        x = self.conv(self.other(self.before(x)))
        y = F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        return F.relu(y)


def _under_no_grad(x: Any) -> Any:
    with torch.no_grad():
        return x * 2


def _on_a_value(x: Any) -> Any:
    return -x if x.sum() > 1e9 else x


def _written(x: Any) -> Any:
    y = x.clone()
    y.data = y.data * 2
    return y


class Otherwise(Two):
    """Calls it with the tensors of one of them, and reads these."""

    def forward(self, x: Any) -> Any:
        x = self.conv(self.other(self.before(x)))
        y = F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        return F.relu(y) * self.bn.running_var.sum()


@pytest.mark.parametrize("before", [_under_no_grad, _on_a_value, _written])
@pytest.mark.parametrize("nested", [False, True])
def test_each_is_named_with_what_to_do(before: Callable[[Any], Any], nested: bool) -> None:
    net: nn.Module = Otherwise(before)
    net = randomize_batch_norms(nn.Sequential(net, nn.ReLU()) if nested else net).eval()
    converted = pn_compiler.transform(net, IMAGES)
    path = "0." * nested
    left, done = pn_compiler.sites(converted)[0], pn_compiler.sites(converted)[1]
    assert (left.name, left.kind, left.code) == (f"{path}bn", "skipped", "PN101")
    assert "self.bn(x)" in left.reason
    assert (done.name, done.kind) == (f"{path}other", "norm_only")


def test_a_local_name_for_the_norm_is_named_too() -> None:
    net = randomize_batch_norms(Direct(_on_a_value)).eval()
    assert [(site.name, site.code) for site in pn_compiler.sites(pn_compiler.transform(net, IMAGES))] == [
        ("bn", "PN101"),
        ("other", "PN101"),
    ]


class Functional(nn.Module):
    """In-place ABN: batch_norm on tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return F.leaky_relu(y, 0.01)


class Around(nn.Module):
    """Names a parameter and has operators in place: weights of its children absorb nothing."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))
        self.abn, self.out = Functional(), nn.Conv2d(4, 2, 1)
        self.before = before

    def forward(self, x: Any) -> Any:
        y = self.before(x) * 1
        y.mul_(2)
        return self.out(self.abn(F.conv2d(y, self.weight)))


@pytest.mark.parametrize("before", [_under_no_grad, _on_a_value])
def test_a_module_that_only_normalizes_is_converted_where_weights_may_be_written(
    before: Callable[[Any], Any],
) -> None:
    torch.manual_seed(0)
    net = Around(before).eval()
    with torch.no_grad():
        net.abn.running_mean.normal_()
        net.abn.running_var.uniform_(0.5, 2)
        net.abn.weight.uniform_(0.5, 2)
        net.abn.bias.normal_()
    converted = pn_compiler.transform(net, IMAGES, norm="layer", proxy=False, strict=True)
    assert type(converted) is Around
    assert isinstance(converted.abn, fx.GraphModule)
    (site,) = pn_compiler.sites(converted)
    assert site.activation == "leakyrelu"
    by_hand = copy.deepcopy(net)
    normalizer = nn.GroupNorm(1, 4)  # the conversion by the formula of docs/method.md is tested elsewhere
    normalizer.load_state_dict(converted.get_submodule(site.name).state_dict())
    by_hand.abn = nn.Sequential(normalizer, nn.LeakyReLU(0.01))
    assert_same_outputs(converted(IMAGES), by_hand(IMAGES))
    assert torch.equal(converted.weight, net.weight)


# batch_norm on nothing but the tensors of a BatchNorm


class InModes(nn.Module):
    """Calls batch_norm with the tensors of its BatchNorms, under modes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3)
        self.fixed, self.trained = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = F.batch_norm(
                self.conv(x), self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias,
                self.bn.training, self.bn.momentum, self.bn.eps,
            )  # fmt: skip
        with torch.no_grad():
            z = self.fixed(F.relu(y))
        z = torch.batch_norm(
            z * y.mean(1, keepdim=True), self.trained.weight, self.trained.bias, self.trained.running_mean,
            self.trained.running_var, False, 0.1, 1e-5, True,
        )  # fmt: skip
        return F.relu(z)


class OnValues(nn.Module):
    """Branches on values, and calls batch_norm in another method, twice, and the BatchNorm itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.bn = InModes(), nn.BatchNorm2d(6)

    def again(self, x: Tensor) -> Tensor:
        bn_input = x + 1
        return F.batch_norm(bn_input, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        return self.again(F.relu(self.again(x))) + self.bn(x) if x.sum() < 1e9 else x


class Rewrites(nn.Module):
    """Sets the data of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x.data = x.data * 2
        x = nn.functional.batch_norm(
            x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, self.training
        )
        return self.conv(F.relu(x))


def _pair(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """(the converted network, the original with each batch_norm done by hand), in float64."""
    torch.manual_seed(0)
    net = randomize_batch_norms(make()).double().eval()
    converted = pn_compiler.transform(net, IMAGES.double(), strict=True, **options)
    return converted, ByHand(net, pn_compiler.sites(converted))


@pytest.mark.parametrize("make", [InModes, OnValues, Rewrites])
@pytest.mark.parametrize("options", [{}, {"norm": "instance"}, {"warm_start": "none"}])
def test_calls_with_the_tensors_of_a_batch_norm_are_converted(
    make: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    converted, by_hand = _pair(make, **options)
    norms = [
        name for name, module in make().named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    assert [(site.name, site.kind) for site in pn_compiler.sites(converted)] == [
        (n, "norm_only") for n in norms
    ]
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in converted.modules())
    for x in (IMAGES.double(), IMAGES.double() * 300 + 50):
        assert_same_outputs(converted(x), by_hand(x), tolerance=1e-10)
        assert_same_outputs(converted(x)[:1], converted(x[:1]), tolerance=1e-10)


@pytest.mark.parametrize("make", [InModes, OnValues, Rewrites])
@pytest.mark.parametrize("training", [False, True])
def test_their_gradients_are_those_of_the_original(make: Callable[[], nn.Module], training: bool) -> None:
    converted, by_hand = _pair(make, warm_start="none")
    for net in (converted, by_hand):
        net.train(training)(IMAGES.double()).square().sum().backward()
    expected = {name.removeprefix("model."): p.grad for name, p in by_hand.named_parameters()}
    actual = {name: p.grad for name, p in converted.named_parameters() if name in expected}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:  # behind the no_grad of the forward
            assert actual[name] is None
        else:
            torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-9)
    frozen = {name for name, gradient in expected.items() if gradient is None}
    assert frozen == {name for name in expected if "fixed." in name}


def test_copies_pickles_and_state_dicts_are_the_same_network() -> None:
    converted, _ = _pair(OnValues)
    x = IMAGES.double()
    expected = converted(x)
    copied = copy.deepcopy(converted)
    again = pickle.loads(pickle.dumps(converted))
    assert torch.equal(copied(x), expected)
    assert torch.equal(again(x), expected)
    with torch.no_grad():
        copied.part.bn.weight.mul_(2)
    assert torch.equal(converted(x), expected)
    assert not torch.equal(copied(x), expected)
    copied.load_state_dict(converted.state_dict())
    assert torch.equal(copied(x), expected)
    assert converted.state_dict().keys() == {
        *(f"{name}.{key}" for name in ("bn", "part.bn", "part.trained") for key in NORMALIZER),
        *(f"part.{name}.{key}" for name in ("conv", "fixed") for key in ("weight", "bias")),
    }


def test_a_checkpoint_of_the_original_can_be_loaded() -> None:
    converted, _ = _pair(Rewrites)
    torch.manual_seed(1)
    other = randomize_batch_norms(Rewrites()).double().eval()
    converted.load_state_dict(pn_compiler.convert_state_dict(other.state_dict(), converted))
    expected = pn_compiler.transform(other, IMAGES.double())
    assert_same_outputs(converted(IMAGES.double()), expected(IMAGES.double()), tolerance=1e-10)


@pytest.mark.parametrize("how", ["compiled", "exported", "strictly exported"])
def test_what_captures_networks_captures_these(how: str) -> None:
    converted, by_hand = _pair(InModes)
    x = IMAGES.double()
    captured: Any = {
        "compiled": lambda: torch.compile(converted, fullgraph=True, backend="eager"),
        "exported": lambda: torch.export.export(converted, (x,)).module(),
        "strictly exported": lambda: torch.export.export(converted, (x,), strict=True).module(),
    }[how]()
    assert_same_outputs(captured(x), by_hand(x), tolerance=1e-10)


def test_the_file_computes_what_the_conversion_by_hand_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = randomize_batch_norms(InModes()).eval()
    pn_compiler.compile(net, tmp_path / "model.onnx", IMAGES)
    converted = pn_compiler.transform(net, IMAGES)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    by_hand = ByHand(net, pn_compiler.sites(converted))
    assert_same_outputs(torch.from_numpy(actual), by_hand(IMAGES), tolerance=1e-4)


def test_calibration_and_freezing_work_around_them() -> None:
    torch.manual_seed(0)
    net = randomize_batch_norms(Rewrites()).eval()
    converted = pn_compiler.transform(net, IMAGES, warm_start="calibrate", calibration=[IMAGES], strict=True)
    plain = pn_compiler.transform(net, IMAGES)
    assert_same_outputs(converted(IMAGES), plain(IMAGES), tolerance=1e-6)
    frozen, report = pn_compiler.freeze_statistics(converted, [IMAGES.repeat(8, 1, 1, 1)])
    assert [(site.name, site.frozen) for site in report.sites] == [("bn", False)]
    assert_same_outputs(frozen(IMAGES), converted(IMAGES), tolerance=1e-6)


@pytest.mark.parametrize("make", [InModes, OnValues, Rewrites])
def test_the_mode_in_which_they_are_converted_does_not_matter(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = randomize_batch_norms(make()).train()
    converted = pn_compiler.transform(net, IMAGES, strict=True)
    assert all(module.training for module in converted.modules())
    expected = pn_compiler.transform(net.eval(), IMAGES)
    assert_same_outputs(converted(IMAGES), expected(IMAGES), tolerance=1e-6)


class AndAnother(nn.Module):
    """Calls batch_norm on tensors of its own as well."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.sum() < 1e9 else -x
        x = F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        return F.batch_norm(x, self.mean, self.var)


def test_another_call_beside_it_is_still_reported() -> None:
    converted = pn_compiler.transform(randomize_batch_norms(AndAnother()).eval(), IMAGES)
    codes = [(site.name, site.kind, site.code) for site in pn_compiler.sites(converted)]
    assert codes == [("the model", "skipped", "PN120"), ("bn", "norm_only", "PN201")]


@pytest.mark.parametrize("refuse", ["PN108", "PN109"])
def test_what_is_refused_stays_a_batch_norm(refuse: str) -> None:
    torch.manual_seed(0)
    net = randomize_batch_norms(Rewrites()).eval()
    if refuse == "PN108":
        net.bn.register_forward_hook(lambda module, args, output: None)
    else:
        net.bn.running_var[0] = -0.5
    converted = pn_compiler.transform(net, IMAGES)
    assert [(site.name, site.code) for site in pn_compiler.sites(converted)] == [("bn", refuse)]
    assert type(converted.bn) is nn.BatchNorm2d
    torch.testing.assert_close(converted(IMAGES), net(IMAGES), equal_nan=True)


def test_one_that_a_whole_module_shares_is_refused_once() -> None:
    net = OnValues()
    net.part.trained = net.bn
    converted = pn_compiler.transform(randomize_batch_norms(net).eval(), IMAGES)
    sites = {site.name: site.kind for site in pn_compiler.sites(converted)}
    assert sites == {"part.bn": "norm_only", "part.trained": "skipped"}


class Unread(nn.Module):
    """Its part normalizes for nothing."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.bn(x)
            return x * 2

    def __init__(self) -> None:
        super().__init__()
        self.part, self.bn = self.Part(), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.part(x)) if x.sum() < 1e9 else x


def test_one_that_a_traced_part_does_not_need_is_called_that() -> None:
    converted = pn_compiler.transform(randomize_batch_norms(Unread()).eval(), IMAGES)
    assert [(site.name, site.code) for site in pn_compiler.sites(converted)] == [
        ("part.bn", "PN102"),
        ("bn", "PN201"),
    ]


class OnAValue(nn.Module):
    """Branches on values around a BatchNorm, and around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.body = nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.bn(x)) if x.sum() < 1e9 else x


class AsFunctionOnAValue(OnAValue):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < 1e9:
            x = F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        return self.body(x)


class ReadFrom(nn.Module):
    """Can be traced, and reads what its part has: a penalty, say."""

    def __init__(self, part: nn.Module, path: str) -> None:
        super().__init__()
        self.part, self.path = part, path

    def forward(self, x: Tensor) -> Tensor:
        value: Any = self.part
        for name in self.path.split("."):
            value = getattr(value, name)
        return self.part(x) * value.sum()


@pytest.mark.parametrize("make", [OnAValue, AsFunctionOnAValue])
@pytest.mark.parametrize("path", ["bn.weight", "bn.running_var", "body.0.bias", "body.1.weight"])
def test_what_a_graph_around_them_reads_keeps_its_values(make: Callable[[], nn.Module], path: str) -> None:
    torch.manual_seed(0)
    net = randomize_batch_norms(ReadFrom(make(), path)).double().eval()
    x = IMAGES.double()
    converted = pn_compiler.transform(net, x)
    owner = f"part.{path.rpartition('.')[0]}"
    skipped = [site.name for site in pn_compiler.sites(converted) if site.kind == "skipped"]
    assert skipped == [owner] * (owner != "part.body.1")
    by_hand = ByHand(net, pn_compiler.sites(converted))
    assert_same_outputs(converted(x), by_hand(x), tolerance=1e-10)
