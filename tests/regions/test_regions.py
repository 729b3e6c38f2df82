"""Models that torch.fx cannot trace as a whole: every BatchNorm is reached all the same."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import pn_compiler
from pn_compiler.base.errors import ConfigError
from pn_compiler.testing import assert_same_outputs, count_modules, randomize_batch_norms

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))


class Calls(nn.Module):
    """Branches on values, and calls its parts whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = block(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x) if x.sum() > -1e9 else x
        return self.norm(x)


class Iterates(nn.Module):
    """Branches on values, and walks through a Sequential that must stay one."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Sequential(block(), block())
        self.more = nn.ModuleList([block()])

    def forward(self, x: Tensor) -> Tensor:
        for step in [*self.steps, *self.more]:
            if x.sum() > -1e9:
                x = step(x)
        return x


class Reads(nn.Module):
    """Branches on values, and looks into its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e9:
            return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        return x


class ReadsOne(nn.Module):
    """Branches on values, and looks into one of its BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.other, self.body = nn.BatchNorm2d(4), nn.BatchNorm2d(4), block()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e9:
            x = F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        return self.body(self.other(x))


class ReadsAny(ReadsOne):
    """Looks into whichever it holds."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e9:
            for norm in (self.bn, self.other):
                x = x - norm.running_mean.view(-1, 1, 1)
        return self.body(x)


class Up(nn.Module):
    """Has an optional argument and an attribute that its caller may ask for."""

    use_skip = True

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        return y if skip is None else y + skip


class Asks(nn.Module):
    """Branches on values, and gives its part the optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Up()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            x = -x
        return self.up(x, skip=x)


class Shares(nn.Module):
    """Branches on values, and uses a part of its part again."""

    def __init__(self) -> None:
        super().__init__()
        self.body = block()
        self.again = self.body[3]

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.body(x)) if x.sum() > -1e9 else x


class Helps(nn.Module):
    """Branches on values, and looks into its BatchNorm in a method beside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def scale(self) -> Tensor:
        return self.bn.running_var.view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) * self.scale() if x.sum() > -1e9 else x


class Whole(nn.Module):
    """A traceable model around an untraceable part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem = block()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.stem(x)) + 1


CASES: list[tuple[Callable[[], nn.Module], list[tuple[str, str, str | None]]]] = [
    (Calls, [("body.1", "pn", None), ("norm", "norm_only", "PN201")]),
    # what is walked through keeps its class, and its norms are converted one by one
    (Iterates, [(f"{name}.1", "norm_only", "PN201") for name in ("steps.0", "steps.1", "more.0")]),
    (Asks, [("up.bn", "norm_only", "PN201")]),
    (Shares, [("body.1", "norm_only", "PN201")]),
    (Helps, [("bn", "skipped", "PN101")]),
    (Reads, [("bn", "norm_only", "PN201")]),
    (ReadsOne, [("bn", "norm_only", "PN201"), ("other", "norm_only", "PN201"), ("body.1", "pn", None)]),
    (ReadsAny, [(name, "skipped", "PN101") for name in ("bn", "other", "body.1")]),
]


@pytest.mark.parametrize(("make", "expected"), CASES, ids=lambda c: getattr(c, "__name__", ""))
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_batch_norm_is_reached(
    make: Callable[[], nn.Module], expected: list[tuple[str, str, str | None]], wrapped: bool
) -> None:
    torch.manual_seed(0)
    net: nn.Module = Whole(make()) if wrapped else make()
    net = randomize_batch_norms(net).eval()
    before = copy.deepcopy(net.state_dict())
    if wrapped:
        expected = [("stem.1", "pn", None)] + [(f"part.{name}", kind, code) for name, kind, code in expected]
    converted = pn_compiler.transform(net)
    assert isinstance(converted, fx.GraphModule) is wrapped
    assert [(s.name, s.kind, s.code) for s in pn_compiler.sites(converted)] == expected
    assert_same_outputs(converted(IMAGES), pn_compiler.transform(net, proxy=False)(IMAGES))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert set(dict(converted.named_parameters())) >= set(dict(net.named_parameters()))

    folded = pn_compiler.fold(converted)
    assert count_modules(folded, pn_compiler.nn.ProxyNormAct) == 0
    assert_same_outputs(folded(IMAGES), converted(IMAGES))
    for again in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert_same_outputs(again(IMAGES), converted(IMAGES))
        assert pn_compiler.sites(again) == pn_compiler.sites(converted)
        assert_same_outputs(pn_compiler.fold(again)(IMAGES), converted(IMAGES))


def test_it_trains_and_follows_modes() -> None:
    net = Whole(Calls()).train()
    converted = pn_compiler.transform(net)
    F.mse_loss(converted(IMAGES[:1]), IMAGES[:1]).backward()
    for name, parameter in converted.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    converted.eval()
    assert not any(module.training for module in converted.modules())


def test_notes_carry_whole_paths() -> None:
    converted = pn_compiler.transform(randomize_batch_norms(Whole(Calls())), num_groups=3)
    assert {n.site for n in pn_compiler.notes(converted) if n.code == "PN205"} == {
        "stem.1", "part.body.1", "part.norm",
    }  # fmt: skip


class Branches(nn.Module):
    """Branches on values, around another part that does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Calls(), block()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))


@pytest.mark.parametrize(
    ("model", "leaves", "whole"),
    [
        (Branches(), (), {"inner"}),
        (Branches(), ("outer",), {"inner", "outer"}),
        (nn.Sequential(block(), Iterates()), (), {"1"}),
        (Calls(), (), {""}),
        (nn.Sequential(block(), nn.Sequential(block())), (nn.Sequential,), None),
    ],
)
def test_what_stays_whole_has_a_note_with_a_code(
    model: nn.Module, leaves: tuple[Any, ...], whole: set[str] | None
) -> None:
    converted = pn_compiler.transform(randomize_batch_norms(model).eval(), IMAGES, leaves=leaves)
    said = {note.site for note in pn_compiler.notes(converted) if note.code == "PN128"}
    assert said if whole is None else said >= whole
    if leaves:
        assert any("leaves names it" in str(note) for note in pn_compiler.notes(converted))


class Traceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = block()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_leaves_of_the_users_own_stay_as_they_are() -> None:
    net = randomize_batch_norms(nn.Sequential(block(), Traceable())).eval()
    for leaves in (["1"], [Traceable]):
        converted = pn_compiler.transform(net, leaves=leaves)  # type: ignore[arg-type]
        assert isinstance(converted.get_submodule("1"), Traceable)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
        assert_same_outputs(converted(IMAGES), pn_compiler.transform(net, proxy=False)(IMAGES))
    assert isinstance(pn_compiler.transform(Traceable(), leaves=[Traceable]), Traceable)
    for unknown in (["2"], [nn.LSTM]):
        with pytest.raises(ConfigError, match="leaves: the model has no module"):
            pn_compiler.transform(net, leaves=unknown)  # type: ignore[arg-type]


class Stateful(nn.Module):
    """Counts its calls in four ways, and each of them matters."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how, self.number = block(), how, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "number":
            self.number += 1
            return self.body(x) * self.number
        if self.how == "new tensor":
            self.count = self.count + 1
        elif self.how == "in place":
            self.count += 1
        elif self.how == "add_":
            self.count.add_(1)
        return self.body(x) * self.count


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", ["number", "new tensor", "in place", "add_"])
def test_modules_that_change_their_state_still_do(how: str, nested: bool) -> None:
    net = randomize_batch_norms(Stateful(how)).eval()
    model = nn.Sequential(net, nn.Identity()) if nested else net
    converted = pn_compiler.transform(model)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    first, second = converted(IMAGES), converted(IMAGES)
    assert_same_outputs(second, 2 * first)
    assert net.number == 0
    assert not net.count.any()


def test_what_is_computed_from_a_buffer_follows_it() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)
            self.register_buffer("square", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.square.sqrt() * F.relu(self.bn(x))

    converted = pn_compiler.transform(Scaled())
    before = converted(IMAGES)
    converted.load_state_dict(converted.state_dict() | {"square": torch.tensor(9.0)})
    assert_same_outputs(converted(IMAGES), 3 * before)


def test_values_stored_on_a_module_are_reported() -> None:
    class Stores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = block()

        def forward(self, x: Tensor) -> Tensor:
            self.features = self.body(x)
            return self.features

    converted = pn_compiler.transform(nn.Sequential(Stores()))
    (note,) = (note for note in pn_compiler.notes(converted) if note.code == "PN112")
    assert (note.site, note.message.split(";")[0]) == ("0", "the forward stores self.features")
    kept = pn_compiler.transform(nn.Sequential(Stores()), leaves=["0"])
    assert kept(IMAGES) is kept.get_submodule("0").features


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_function(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = block(), block()

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.first, x, use_reentrant=use_reentrant)
            return checkpoint(self.second, x, use_reentrant=use_reentrant)

    net = randomize_batch_norms(Checkpointed())
    converted = pn_compiler.transform(net)
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn", "pn"]
    x = IMAGES.clone().requires_grad_()
    assert_same_outputs(converted(x), pn_compiler.transform(net, proxy=False)(x))
    converted(x).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())
    traced_away = "PN113" in [note.code for note in pn_compiler.notes(converted)]
    assert traced_away == isinstance(converted, torch.fx.GraphModule)  # else its Python code still runs
    plain = pn_compiler.transform(net.get_submodule("first"))
    assert "PN113" not in [note.code for note in pn_compiler.notes(plain)]


def test_layers_of_the_package_stay_whole() -> None:
    site = pn_compiler.nn.ProxyNormAct(1, 4, nn.SiLU())
    consumer = pn_compiler.nn.InputAffineConv2d(4, 4, 1)
    net = nn.Sequential(nn.Conv2d(4, 4, 1), site, consumer, nn.BatchNorm2d(4), nn.ReLU())
    converted = pn_compiler.transform(net, warm_start="none", proxy=False)
    assert isinstance(converted.get_submodule("1"), pn_compiler.nn.ProxyNormAct)
    assert isinstance(converted.get_submodule("2"), pn_compiler.nn.InputAffineConv2d)
    left_out = pn_compiler.transform(net, warm_start="none", proxy=False, leaves=["1", "2"])
    assert_same_outputs(converted(IMAGES), left_out(IMAGES))


class TwoInputs(nn.Module):
    """Untraceable for the size that a factory gets, with a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = x + y.mean(2, keepdim=True)[..., None] + torch.zeros(x.shape[0], 1, 1, 1)
        return self.out(F.relu(self.bn(self.conv(z))))


def test_example_inputs_are_not_those_of_a_lone_batch_norm(tmp_path: Path) -> None:
    net = randomize_batch_norms(TwoInputs()).eval()
    inputs = (IMAGES, torch.randn(2, 4, 3))
    converted = pn_compiler.transform(net, inputs, strict=True)
    assert [(site.name, site.kind) for site in pn_compiler.sites(converted)] == [("bn", "norm_only")]
    plain = copy.deepcopy(net)
    plain.bn = converted.bn
    assert_same_outputs(converted(*inputs), plain(*inputs))
    pn_compiler.compile(net, tmp_path / "m.onnx", inputs, dynamic_batch=False)


class Of1d(nn.Module):
    """The only input has another rank than what the BatchNorm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x.mean((1, 2)))) if x.sum() < 1e9 else x


def test_the_rank_of_an_input_is_not_that_of_a_lone_batch_norm() -> None:
    net = randomize_batch_norms(Of1d()).eval()
    (site,) = pn_compiler.sites(pn_compiler.transform(net, IMAGES, norm="instance"))
    assert site.num_groups == 1  # of [N, C] an instance norm would leave nothing
