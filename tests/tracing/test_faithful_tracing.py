"""Forwards that do more than compute: the converted network does the same, or its modules stay whole."""

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests.tracing.networks import IMAGES, Net, by_hand, make


def codes(converted: nn.Module) -> list[str]:
    return [note.code for note in pn_compiler.notes(converted) if "PN114" <= note.code <= "PN119"]


# --- types -----------------------------------------------------------------------------------------------


def _attribute(net: Net, x: Any) -> Tensor:
    try:
        return x.tensors
    except AttributeError:
        return x * 2


def _named(x: Any) -> Tensor:
    match x:
        case torch.Tensor():
            return x * 2
    return x


def _sequence(net: Net, x: Any) -> Tensor:
    match x:
        case [first, *_]:
            return first
    return x * 2


@functools.singledispatch
def _dispatched(x: Any) -> Any:
    return x


@_dispatched.register
def _(x: torch.Tensor) -> Tensor:
    return x * 2


renamed_isinstance = isinstance
renamed_type = type

TYPE_TESTS: dict[str, Callable[[Net, Any], Any]] = {
    "isinstance": lambda net, x: x * 2 if isinstance(x, torch.Tensor) else x,
    "isinstance of several": lambda net, x: x if isinstance(x, (list, tuple)) else x * 2,
    "isinstance of a union": lambda net, x: x * 2 if isinstance(x, torch.Tensor | None) else x,
    "isinstance of a parameter": lambda net, x: x * 2 if isinstance(net.conv.bias, nn.Parameter) else x,
    "isinstance of an int": lambda net, x: x * 2 if isinstance(x.shape[0], int) else x,
    "isinstance of a shape": lambda net, x: x * 2 if isinstance(x.size(), tuple) else x,
    "isinstance of a result": lambda net, x: x * 2 if isinstance(F.relu(x + 1)[0], torch.Tensor) else x,
    "isinstance of pieces": lambda net, x: x * 2 if isinstance(x.chunk(3, 1), tuple) else x,
    "isinstance renamed": lambda net, x: x * 2 if renamed_isinstance(x, torch.Tensor) else x,
    "type renamed": lambda net, x: x * 2 if renamed_type(x) is torch.Tensor else x,
    "is_tensor": lambda net, x: x * 2 if torch.is_tensor(x) else x,
    "type is": lambda net, x: x * 2 if type(x) is torch.Tensor else x,
    "type ==": lambda net, x: x * 2 if type(x) == torch.Tensor else x,  # noqa: E721
    "issubclass": lambda net, x: x * 2 if issubclass(type(x), torch.Tensor) else x,
    "table": lambda net, x: x * {torch.Tensor: 2}.get(type(x), 1),
    "name": lambda net, x: x * 2 if type(x).__name__ == "Tensor" else x,
    "__class__": lambda net, x: x * 2 if x.__class__ is torch.Tensor else x,
    "hasattr": lambda net, x: x if hasattr(x, "tensors") else x * 2,
    "getattr": lambda net, x: getattr(x, "tensors", x * 2),
    "except AttributeError": _attribute,
    "jit.isinstance": lambda net, x: x * 2 if torch.jit.isinstance(x, torch.Tensor) else x,
    "jit.isinstance of a list": lambda net, x: x if torch.jit.isinstance(x, list[torch.Tensor]) else x * 2,
    "match class": lambda net, x: _named(x),
    "match sequence": _sequence,
    "callable": lambda net, x: x if callable(x) else x * 2,
    "singledispatch": lambda net, x: _dispatched(x),
    "grad": lambda net, x: x * 2 if x.grad is None else x,
    "dtype": lambda net, x: x * 2 if x.dtype == torch.float32 else x,
    "dtype in": lambda net, x: x if x.dtype in (torch.uint8, torch.int32) else x * 2,
    "device": lambda net, x: x if x.device.type == "cuda" else x * 2,
    "is_cuda": lambda net, x: x if x.is_cuda else x * 2,
    "ndim": lambda net, x: x * 2 if x.ndim == 4 else x,
    "shape": lambda net, x: x * 2 if x.shape[1] in (1, 3) else x,
    "requires_grad": lambda net, x: x if x.requires_grad else x * 2,
    "is_contiguous": lambda net, x: x * 2 if x.is_contiguous() else x,
    "len": lambda net, x: x * len(x),
}


def _caught(net: Net, x: Any) -> Any:
    try:
        return x * 2 if x.mean() < 9 else x
    except Exception:
        return x


TYPE_TESTS["caught"] = _caught


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", TYPE_TESTS)
def test_the_branch_is_that_of_a_call(name: str, train: bool, nested: bool, given: bool) -> None:
    net = make(TYPE_TESTS[name], nested=nested, train=train)
    converted = pn_compiler.transform(net, IMAGES if given else None, proxy=False)
    assert_same_outputs(converted.eval()(IMAGES), by_hand(net, converted).eval()(IMAGES))


# --- writes to parameters --------------------------------------------------------------------------------


class Scaled(nn.Conv2d):
    """A convolution that rewrites its weight in some way before each call."""

    def __init__(self, write: Callable[[nn.Conv2d], Any], *sizes: int) -> None:
        super().__init__(*sizes)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        return super().forward(x)


def _set_data(conv: nn.Conv2d) -> None:
    conv.weight.data = torch.renorm(conv.weight.data, 2, 0, 0.1)


def _set_new(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(torch.ones_like(conv._parameters["weight"]))


def _copy(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight.copy_(torch.renorm(conv.weight, 2, 0, 0.1))


def _all(conv: nn.Conv2d) -> None:
    for parameter in conv.parameters():
        parameter.data.clamp_(-0.01, 0.01)


def _all_data(conv: nn.Conv2d) -> None:
    for parameter in conv.parameters():
        parameter.data = parameter.data.clamp(-0.01, 0.01)


def _freeze(conv: nn.Conv2d) -> None:
    conv.weight.requires_grad = False


def _freeze_all(conv: nn.Conv2d) -> None:
    conv.requires_grad_(False)


def _items(conv: nn.Conv2d) -> None:
    conv.weight.data[0] = 0


def _delete(conv: nn.Conv2d) -> None:
    conv.weight.grad = None


WRITES: dict[str, Callable[[nn.Conv2d], Any]] = {
    "data": _set_data,
    "new parameter": _set_new,
    "copy_": _copy,
    "mul_": lambda conv: conv.weight.data.mul_(0.5),
    "detached view": lambda conv: conv.weight.detach().view(-1)[:3].zero_(),
    "function in place": lambda conv: F.relu_(conv.weight.data),
    "out": lambda conv: torch.mul(conv.weight.data, 0.5, out=conv.weight.data),
    "foreach": lambda conv: torch._foreach_mul_([conv.weight.data], 0.5),
    "items": _items,
    "all parameters": _all,
    "data of all parameters": _all_data,
    "requires_grad": _freeze,
    "requires_grad_": _freeze_all,
    "init": lambda conv: nn.init.ones_(conv.weight),
    "grad": _delete,
    "own dict": lambda conv: conv._parameters["weight"].data.mul_(0.5),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_forwards_that_rewrite_their_weights_still_do(name: str, train: bool, wrapped: bool) -> None:
    torch.manual_seed(0)
    conv = Scaled(WRITES[name], 3, 4, 3)
    net: nn.Module = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ELU(), Scaled(WRITES[name], 4, 3, 1))
    path = ""
    if wrapped:
        net, path = nn.Sequential(net, nn.ReLU()), "0."
    net = randomize_batch_norms(net).train(train)
    before = copy.deepcopy(net.state_dict())
    flags = {key: parameter.requires_grad for key, parameter in net.named_parameters()}
    converted = pn_compiler.transform(net, IMAGES, proxy=False)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert flags == {key: parameter.requires_grad for key, parameter in net.named_parameters()}
    assert "PN115" in codes(converted)
    expected = copy.deepcopy(net)
    expected.set_submodule(f"{path}1", copy.deepcopy(converted.get_submodule(f"{path}1")))
    for _ in range(2):
        assert_same_outputs(converted(IMAGES), expected(IMAGES))
    for key, value in converted.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key
    for key, parameter in converted.named_parameters():
        assert parameter.requires_grad is expected.get_parameter(key).requires_grad


def test_nothing_is_absorbed_into_weights_that_the_owner_rewrites() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            for parameter in self.parameters():
                parameter.data.clamp_(-0.1, 0.1)
            return self.body(x)

    for net in (Owner(), nn.Sequential(Owner(), nn.ReLU())):
        converted = pn_compiler.transform(randomize_batch_norms(net).eval())
        assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]
        assert type(converted.get_submodule(pn_compiler.sites(converted)[0].name[:-1] + "2")) is nn.Conv2d


# --- modes -----------------------------------------------------------------------------------------------


def _no_grad(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.part(x)


def _enable_grad(net: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return net.part(x)


def _inference(net: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return net.part(x)


def _set_grad(net: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        return net.part(x)


def _set_grad_function(net: Any, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    try:
        return net.part(x)
    finally:
        torch.set_grad_enabled(True)


@torch.no_grad()
def _decorated(net: Any, x: Tensor) -> Tensor:
    return net.part(x)


def _autocast_off(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return net.part(x.float())


def _autocast_on(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net.part(x).float()


class Moded(nn.Module):
    """Computes a part under a mode of its own."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
        self.out = nn.Conv2d(3, 3, 1)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.call(self, self.out(x)))


class Frozen(Moded):
    """Computes its backbone without gradients, in so many words."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.part(x)
        return self.out(x)


def test_what_is_called_without_gradients_is_a_region_of_its_own() -> None:
    net = randomize_batch_norms(Frozen(_no_grad)).train()
    converted = pn_compiler.transform(net)
    assert codes(converted) == ["PN116"]
    assert isinstance(converted.get_submodule("part"), fx.GraphModule)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    converted(IMAGES).sum().backward()
    trained = {name for name, parameter in converted.named_parameters() if parameter.grad is not None}
    assert trained == {"out.weight", "out.bias"}


MODES = [
    _no_grad, _enable_grad, _set_grad, _set_grad_function, _decorated, _autocast_off, _autocast_on,
]  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("call", MODES)
@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad])
def test_modes_of_a_forward_stay(call: Any, train: bool, nested: bool, around: Any) -> None:
    torch.manual_seed(0)
    net: nn.Module = Moded(call)
    net = randomize_batch_norms(nn.Sequential(net, nn.ReLU()) if nested else net).train(train)
    with around():
        converted = pn_compiler.transform(net, IMAGES, proxy=False)
    path = "0.part.1" if nested else "part.1"
    assert codes(converted) == ["PN116"]
    expected = copy.deepcopy(net)
    expected.set_submodule(path, copy.deepcopy(converted.get_submodule(path)))
    for model in (converted, expected):
        model(IMAGES).sum().backward()
    for key, parameter in converted.named_parameters():
        other = expected.get_parameter(key)
        assert (parameter.grad is None) is (other.grad is None), key
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = converted(IMAGES), expected(IMAGES)
    assert got.dtype is want.dtype
    assert_same_outputs(got, want)
    with torch.no_grad():
        assert converted(IMAGES).requires_grad is expected(IMAGES).requires_grad


def test_inference_mode_and_the_part_below_it() -> None:
    net = randomize_batch_norms(Moded(_inference)).eval()
    with torch.inference_mode():
        converted = pn_compiler.transform(net)
        assert codes(converted) == ["PN116"]
        assert_same_outputs(converted(IMAGES), pn_compiler.transform(net, proxy=False)(IMAGES))
    assert isinstance(converted, Moded)


def test_shapes_may_be_read_without_gradients() -> None:
    def read(net: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = x.shape[0] * 2
        return x * size

    converted = pn_compiler.transform(make(read, nested=False, train=False))
    assert isinstance(converted, fx.GraphModule)
    assert not codes(converted)


# --- randomness ------------------------------------------------------------------------------------------


class Rng:
    """Generators that only Python objects hold."""

    numpy = np.random.default_rng(0)
    python = random.Random(0)
    torch = torch.Generator()


RNG = np.random.default_rng(1)

DRAWS: dict[str, Callable[[Net, Any], Any]] = {
    "randn": lambda net, x: x + torch.randn(1, 3, 1, 1),
    "rand_like": lambda net, x: x + torch.rand_like(torch.ones(1, 3, 1, 1)),
    "bernoulli": lambda net, x: x + torch.bernoulli(torch.full((1, 3, 1, 1), 0.5)),
    "generator": lambda net, x: x + torch.rand(1, 3, 1, 1, generator=Rng.torch),
    "dropout": lambda net, x: x + F.dropout(torch.ones(1, 3, 1, 1), 0.5, training=True),
    "normal_": lambda net, x: x + torch.empty(1, 3, 1, 1).normal_(),
    "randperm": lambda net, x: x * torch.randperm(6),
    "random": lambda net, x: x * random.random(),
    "choice": lambda net, x: x * random.choice(range(1000)),
    "layer drop": lambda net, x: x * random.random() if random.random() < 2 else x,
    "own random": lambda net, x: x * Rng.python.random(),
    "np.random": lambda net, x: x * float(np.random.rand()),  # noqa: NPY002
    "default_rng of the module": lambda net, x: x * float(net.rng.random()),
    "default_rng of the file": lambda net, x: x * float(RNG.random()),
    "urandom": lambda net, x: x * int.from_bytes(__import__("os").urandom(2), "big"),
    "time": lambda net, x: x * (__import__("time").time_ns() % 1_000_003),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_drawn_in_each_call(name: str, train: bool, nested: bool) -> None:
    net = make(DRAWS[name], nested=nested, train=train)
    inner: Any = net[0] if isinstance(net, nn.Sequential) else net
    inner.rng = np.random.default_rng(2)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    converted = pn_compiler.transform(net, IMAGES)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert inner.rng.bit_generator.state == np.random.default_rng(2).bit_generator.state
    assert codes(converted) == ["PN117"]
    assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]
    converted.eval()
    assert not torch.equal(converted(IMAGES), converted(IMAGES))


def test_draws_that_a_graph_repeats_stay_in_it() -> None:
    net = make(lambda net, x: x + torch.rand_like(x), nested=False, train=False)
    converted = pn_compiler.transform(net)
    assert isinstance(converted, fx.GraphModule)
    assert not codes(converted)
    assert not torch.equal(converted(IMAGES), converted(IMAGES))


def test_globals_of_the_model_are_as_before() -> None:
    before = dict(globals())
    for given in (None, IMAGES):
        pn_compiler.transform(make(TYPE_TESTS["isinstance renamed"], nested=True, train=False), given)
        pn_compiler.transform(make(_caught, nested=True, train=False), given)
    assert globals().keys() == before.keys()
    assert all(globals()[name] is value for name, value in before.items())
    assert renamed_isinstance is isinstance
    assert "isinstance" not in globals()


# --- what no proxy was asked: text, errors, parameters() --------------------------------------------------


def _text(net: Net, x: Any) -> Tensor:
    return x * {"torch.Size([2, 3, 6, 6])": 3.0}.get(str(x.shape), 1.0)


def _formatted(net: Net, x: Any) -> Tensor:
    return x * {"6x6": 3.0}.get(f"{x.size(2)}x{x.size(3)}", 1.0)


def _representation(net: Net, x: Any) -> Tensor:
    return x * len(repr(x.shape))


def _other_after_error(net: Net, x: Any) -> Tensor:
    try:
        return x.view(2, 3, 5) * 2
    except RuntimeError:
        return x * 3


def _grad_enabled(net: Net, x: Any) -> Tensor:
    return x * 2 if torch.is_grad_enabled() else x


def _penalty(net: Net, x: Any) -> Tensor:
    return x * sum(p.square().sum() for p in net.out.parameters())


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("before", "code"),
    [
        (_text, "PN114"), (_formatted, "PN114"), (_representation, "PN114"), (_other_after_error, "PN114"),
        (_grad_enabled, "PN116"), (_penalty, "PN115"),
    ],
)  # fmt: skip
def test_what_no_proxy_is_asked(
    before: Callable[[Net, Any], Any], code: str | None, nested: bool, train: bool, example: bool
) -> None:
    net = make(before, nested=nested, train=train)
    converted = pn_compiler.transform(net, IMAGES if example else None)
    assert codes(converted) == ([code] if code else [])
    assert [site.kind for site in pn_compiler.sites(converted)] == ["norm_only"]
    with torch.no_grad():
        assert_same_outputs(converted(IMAGES), by_hand(net, converted)(IMAGES))
        for parameter in converted.parameters():
            parameter.mul_(1.1)
        assert_same_outputs(converted(IMAGES), _with_parameters_of(converted, net)(IMAGES))


def _with_parameters_of(converted: nn.Module, net: nn.Module) -> nn.Module:
    changed = by_hand(net, converted)
    changed.load_state_dict(converted.state_dict())
    return changed


def test_text_in_a_message_does_no_harm() -> None:
    def before(net: Net, x: Any) -> Tensor:
        torch._assert(x.shape[1] == 3, f"{x.shape} has {x.size(1)} channels")
        return x

    converted = pn_compiler.transform(make(before, nested=True, train=False), IMAGES)
    assert codes(converted) == []
    assert pn_compiler.sites(converted)[0].kind == "pn"


def test_parts_of_higher_order_operators_are_no_obstacle() -> None:
    def before(net: Net, x: Any) -> Tensor:
        return torch.cond(x.sum() > 0, lambda v: v * 2.0, lambda v: v * 1.0, (x,))

    net = make(before, nested=False, train=False)
    converted = pn_compiler.transform(net, IMAGES)
    assert_same_outputs(converted(IMAGES), by_hand(net, converted)(IMAGES))


def test_data_parallel_inside_a_model_is_entered() -> None:
    net = nn.Sequential(nn.DataParallel(make(lambda net, x: x, nested=False, train=False)))
    (site,) = pn_compiler.sites(pn_compiler.transform(net))
    assert site.name == "0.module.bn"
    assert site.kind != "skipped"
