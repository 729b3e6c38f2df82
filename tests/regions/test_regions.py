"""Models that torch.fx cannot trace as a whole: every BatchNorm is reached all the same."""

import copy
import math
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
    assert_same_outputs(converted(IMAGES), pn_compiler.transform(net, proxy=False, leaves=["1", "2"])(IMAGES))


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


SHARED_ACT = nn.SiLU()


class ConvBlock(nn.Module):
    """As in YOLO: one activation, and other modules without parameters, for all blocks."""

    def __init__(self, channels: int, drop: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8), SHARED_ACT
        self.rest = nn.Sequential(drop, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.act(self.bn(self.conv(x))))


class Depends(nn.Module):
    def __init__(self, one: nn.Module, two: nn.Module) -> None:
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x) if x.mean() < 1e9 else x


def test_modules_without_parameters_may_be_shared() -> None:
    drop = nn.Dropout(0.5)
    net = randomize_batch_norms(Depends(ConvBlock(4, drop), ConvBlock(8, drop))).eval()
    converted = pn_compiler.transform(net, IMAGES, strict=True)
    assert [site.name for site in pn_compiler.sites(converted)] == ["one.bn", "two.bn"]
    assert all(site.activation == "silu" for site in pn_compiler.sites(converted))
    straight = nn.Sequential(net.one, net.two)  # one graph
    assert_same_outputs(
        converted(IMAGES),
        pn_compiler.transform(straight, proxy=False, warm_start="auto")(IMAGES),
        tolerance=1e-5,
    )
    assert isinstance(SHARED_ACT, nn.SiLU)
    assert not SHARED_ACT.inplace


@pytest.mark.parametrize("affine", [False, True])
def test_a_shared_batch_norm_is_refused(affine: bool) -> None:
    shared = nn.BatchNorm2d(8, affine=affine)
    one = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), shared)
    two = nn.Sequential(shared, nn.BatchNorm2d(8))
    converted = pn_compiler.transform(Depends(one, two).eval(), IMAGES)
    codes = {site.name: site.code for site in pn_compiler.sites(converted)}
    assert codes.pop("one.3") == "PN101"
    assert "PN101" not in codes.values()
    assert count_modules(converted, nn.BatchNorm2d) == 1


def tied(tie: str) -> Depends:
    """A convolution that both blocks have, right behind a site that would change its weight."""
    torch.manual_seed(0)
    shared = nn.Conv2d(8, 8, 1)
    other = nn.Conv2d(8, 8, 1)
    other.weight, other.bias = shared.weight, shared.bias
    one = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), shared, nn.BatchNorm2d(8))
    two = nn.Sequential(
        shared if tie == "module" else other, nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 2, 1)
    )
    return randomize_batch_norms(Depends(one, two)).eval()  # type: ignore[return-value]


@pytest.mark.parametrize("tie", ["module", "parameter"])
def test_a_shared_weight_is_left_alone_and_its_batch_norms_convert(tie: str) -> None:
    net = tied(tie)
    converted = pn_compiler.transform(net, IMAGES, strict=True)
    assert {site.name for site in pn_compiler.sites(converted)} == {"one.1", "one.4", "two.1"}
    assert count_modules(converted, nn.BatchNorm2d) == 0
    state = converted.state_dict()
    for name in ("one.3", "two.0"):
        for key in ("weight", "bias"):
            assert torch.equal(state[f"{name}.{key}"], net.one[3].get_parameter(key))  # type: ignore[operator, index]
    by_hand = copy.deepcopy(net)
    for name in ("one.1", "one.4", "two.1"):
        by_hand.set_submodule(name, converted.get_submodule(name))
    assert_same_outputs(converted(IMAGES), by_hand(IMAGES))


class GhostBatchNorm(nn.Module):
    """As in TabNet: normalizes pieces of the batch."""

    def __init__(self, features: int, size: int = 2) -> None:
        super().__init__()
        self.size, self.bn = size, nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.chunk(math.ceil(x.shape[0] / self.size), 0)
        return torch.cat([self.bn(piece) for piece in pieces], 0)


class Gated(nn.Module):
    """A GLU_Layer, whose linear layer may belong to others as well."""

    def __init__(self, features: int, out: int, fc: nn.Linear | None = None) -> None:
        super().__init__()
        self.out, self.bn = out, GhostBatchNorm(2 * out)
        self.fc = fc if fc is not None else nn.Linear(features, 2 * out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.fc(x))
        return x[:, : self.out] * torch.sigmoid(x[:, self.out :])


class Features(nn.Module):
    """A FeatTransformer: shared and own layers, added up."""

    def __init__(self, shared: list[nn.Linear], out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([*(Gated(0, out, fc) for fc in shared), Gated(out, out)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in list(self.layers)[1:]:
            x = (x + layer(x)) * 0.5**0.5
        return x


class TabNet(nn.Module):
    def __init__(self, depends: bool) -> None:
        super().__init__()
        shared = [nn.Linear(6, 8, bias=False), nn.Linear(4, 8, bias=False)]
        self.first, self.steps = nn.BatchNorm1d(6), nn.ModuleList(Features(shared, 4) for _ in range(3))
        self.head, self.depends = nn.Linear(4, 2), depends

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        total = x.new_zeros(1)
        for step in self.steps:
            if not self.depends or x.sum() < 1e9:
                total = total + F.relu(step(x))
        return self.head(total)


@pytest.mark.parametrize("depends", [False, True])
@pytest.mark.parametrize("inputs", [False, True])
def test_tabnet_shares_its_linear_layers(depends: bool, inputs: bool) -> None:
    torch.manual_seed(0)
    net = randomize_batch_norms(TabNet(depends)).eval()
    x = torch.randn(5, 6)
    converted = pn_compiler.transform(net, x if inputs else None, strict=True)
    assert len(pn_compiler.sites(converted)) == 10
    assert count_modules(converted, nn.BatchNorm1d) == 0
    for name, parameter in converted.named_parameters():
        if ".fc." in name:
            assert torch.equal(parameter, net.get_parameter(name))
    by_hand = copy.deepcopy(net)
    for site in pn_compiler.sites(converted):
        by_hand.set_submodule(site.name, converted.get_submodule(site.name))
    assert_same_outputs(converted(x), by_hand(x))
    for index in range(5):  # the pieces of a batch no longer matter
        assert_same_outputs(converted(x)[index : index + 1], converted(x[index : index + 1]))


class TwoNames(nn.Module):
    """Calls its BatchNorm in a part that cannot be traced, and before that if `also_before`."""

    class Part(nn.Module):
        def __init__(self, bn: nn.Module) -> None:
            super().__init__()
            self.bn = bn

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) if x.mean() < 1e9 else x

    def __init__(self, also_before: bool) -> None:
        super().__init__()
        self.bn, self.also_before = nn.BatchNorm2d(4), also_before
        self.part = self.Part(self.bn)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(torch.relu(self.bn(x)) if self.also_before else x)


@pytest.mark.parametrize("also_before", [False, True])
def test_a_batch_norm_that_untraceable_code_calls_too_stays_under_both_names(also_before: bool) -> None:
    converted = pn_compiler.transform(randomize_batch_norms(TwoNames(also_before)).eval(), IMAGES)
    (site,) = pn_compiler.sites(converted)
    assert (site.name, site.kind, site.code) == ("bn", "skipped", "PN101")
    kinds = {type(m) for n, m in converted.named_modules(remove_duplicate=False) if n.endswith("bn")}
    assert kinds == {nn.BatchNorm2d}
