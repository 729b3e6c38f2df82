"""Normalizers move before expansions; in float64 the numbers are those of the module before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from pn_compiler.nn import FoldedNorm
from pn_compiler.passes.fold.normalize_before_expansion import Expansion, NormalizeBeforeExpansion
from pn_compiler.testing import assert_batch_independent, assert_same_outputs
from tests.passes.graphs import called, run, traced, untouched

STATISTICS = ("group", "anchored", "rms")
X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def normalizer(
    statistics: str, channels: int, groups: int = 1, *, affine: bool = True, shifted: bool = False
) -> nn.GroupNorm | FoldedNorm:
    """One of those that a folded network has, with random values."""
    torch.manual_seed(2)
    if statistics == "group":
        norm: Any = nn.GroupNorm(groups, channels, 0.01, affine=affine)
    else:
        norm = FoldedNorm(
            groups, channels, centered=statistics == "anchored", share=torch.rand(groups) + 0.1,
            var=torch.rand(groups) + 0.01, shift=torch.randn(channels) if shifted else None,
            weight=torch.ones(channels) if affine else None, bias=torch.zeros(channels) if affine else None,
        )  # fmt: skip
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


class Net(nn.Module):
    """An expansion, its normalizer, and a function of both results."""

    def __init__(
        self,
        linear: nn.Module,
        norm: nn.Module,
        read: Callable[["Net", Tensor, Tensor], Any] = lambda net, y, z: z.relu(),
    ) -> None:
        super().__init__()
        self.linear, self.norm, self.read = linear, norm, read

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return self.read(self, y, self.norm(y))


def conv(channels: int = 32, kernel: int = 1, **options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, channels, kernel, **options)


def narrowing(model: Net, x: Tensor, **options: Any) -> tuple[fx.GraphModule, NormalizeBeforeExpansion]:
    """The graph of `model`, in float64, and the pass for inputs such as `x`."""
    model = model.double().eval()
    shapes = {"norm": tuple(model.linear(x).shape)} if isinstance(x, Tensor) else {}
    return traced(model, x), NormalizeBeforeExpansion(shapes, **options)


@torch.no_grad()
def narrowed(model: Net, x: Tensor = X, channels: int = 16, **options: Any) -> fx.GraphModule:
    """The graph of `model` with its normalizer on so many `channels`, which computes what `model` does."""
    gm, graph_pass = narrowing(model, x, **options)
    wide, before = model.norm.num_channels, {k: v.clone() for k, v in gm.state_dict().items()}
    result = run(graph_pass, gm)
    assert result.rewritten == 1
    assert [str(note) for note in result.notes] == [f"PN219 norm: {channels} of {wide} channels"]
    assert called(gm) == [type(model.linear), type(model.norm), type(model.linear)]
    norm = gm.get_submodule("norm")
    assert (norm.num_channels, norm.weight, norm.bias) == (channels, None, None)
    assert_same_outputs(gm(x), model(x))
    assert_batch_independent(gm, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return gm


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_the_result_is_that_of_the_normalizer_behind_the_expansion(
    statistics: str, shifted: bool, bias: bool, affine: bool
) -> None:
    constant, mean = bias or (shifted and statistics != "group"), statistics != "rms"
    norm = normalizer(statistics, 32, affine=affine, shifted=shifted)
    gm = narrowed(Net(conv(bias=bias), norm), channels=3 + constant + mean, multiple=1)
    assert (gm.get_submodule("linear").bias is not None) == (constant or mean) or statistics != "rms"
    assert (gm.get_submodule("norm_expansion").bias is not None) == affine


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("groups", [2, 4])
def test_each_group_is_an_expansion_of_its_own(statistics: str, groups: int) -> None:
    gm = narrowed(Net(conv(48), normalizer(statistics, 48, groups)), channels=8 * groups, multiple=8)
    assert gm.get_submodule("norm_expansion").groups == groups


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize(
    ("linear", "shape"),
    [
        (nn.Conv1d(3, 20, 1), (2, 3, 7)),
        (nn.Conv3d(3, 20, 1), (2, 3, 2, 3, 4)),
        (nn.Conv2d(3, 20, 1, stride=2, padding=1), (2, 3, 5, 5)),
        (nn.Conv2d(1, 20, 3, stride=2, padding=1, bias=False), (2, 1, 6, 6)),
        (nn.Conv2d(1, 20, (2, 3), padding=1, padding_mode="reflect"), (2, 1, 6, 6)),
        (nn.Conv2d(1, 20, 3, padding="same", dilation=2), (2, 1, 6, 6)),
        (nn.Linear(5, 20), (4, 5)),
    ],
    ids=str,
)
def test_every_layer_that_widens(statistics: str, linear: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    narrowed(Net(linear, normalizer(statistics, 20)), x)


def test_a_linear_layer_with_groups_is_one_of_blocks() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    narrowed(Net(nn.Linear(3, 20), normalizer("rms", 20, 2)), x, channels=8, multiple=4)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_rank_of_the_weight_does_not_matter(statistics: str, rank: int) -> None:
    linear = conv()
    with torch.no_grad():
        linear.weight[:, rank:] = linear.weight[:, :1] * (rank > 0)
        linear.bias[:] = 0.3  # in the span of the constant vector
    narrowed(Net(linear, normalizer(statistics, 32)))


def test_inputs_that_are_pruned_need_no_channels() -> None:
    linear = conv(20, bias=False)
    torch.nn.init.zeros_(linear.weight[:, 1:])
    gm = narrowed(Net(linear, normalizer("rms", 20)), channels=1, multiple=1)
    assert not gm.get_submodule("linear").weight[:, 1:].any()


@pytest.mark.parametrize("statistics", STATISTICS)
@settings(max_examples=15, deadline=None)
@given(exponents=st.lists(st.integers(-9, 9), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_columns_of_any_sizes(statistics: str, exponents: list[int], seed: int) -> None:
    linear, generator = conv().double(), torch.Generator().manual_seed(seed)
    scales = 10 ** torch.tensor(exponents).double()
    with torch.no_grad():
        linear.weight.normal_(generator=generator).mul_(scales[:3].view(1, 3, 1, 1))
        linear.bias.normal_(generator=generator).mul_(scales[3])
    narrowed(Net(linear, normalizer(statistics, 32)))


def test_the_dtype_and_the_mode_are_kept() -> None:
    model = Net(conv(), normalizer("rms", 32)).requires_grad_(False).eval()
    gm = traced(model, X.float())
    assert run(NormalizeBeforeExpansion({"norm": (3, 32, 6, 6)}), gm).rewritten == 1
    assert {p.dtype for p in gm.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in gm.parameters())
    assert not any(module.training for module in gm.modules() if module is not gm)
    assert_same_outputs(gm(X.float()), model.double()(X))


class Twice(nn.Module):
    def __init__(self, again: str) -> None:
        super().__init__()
        self.linear, self.norm, self.other = conv(), normalizer("group", 32), conv()
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x))
        return y + (self.linear(x) if self.again == "linear" else self.norm(self.other(x)))


@pytest.mark.parametrize("again", ["linear", "norm"])
def test_a_module_that_is_called_twice_stays(again: str) -> None:
    gm = traced(Twice(again).double().eval(), X)
    result = untouched(NormalizeBeforeExpansion({"norm": (3, 32, 6, 6)}), gm)
    assert {note.code for note in result.notes} == {"PN126"}
    assert "several places" in result.notes[0].message


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def tied(linear: nn.Conv2d) -> nn.Conv2d:
    linear.other = nn.Conv2d(3, 32, 1)
    linear.other.weight = linear.weight
    return linear


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Net(conv(), normalizer("rms", 32), lambda net, y, z: y + z), "something else reads"),
        (lambda: Net(conv(), normalizer("rms", 32), lambda net, y, z: (y, z)), "something else reads"),
        (lambda: Net(conv(), normalizer("rms", 32), lambda net, y, z: z * y.size(1)), "something else reads"),
        (lambda: Net(hooked(conv()), normalizer("rms", 32)), "hooks"),
        (lambda: Net(conv(), hooked(normalizer("rms", 32))), "hooks"),
        (lambda: Net(conv(), normalizer("rms", 32), lambda net, y, z: z * net.linear.weight.sum()), "shares"),
        (lambda: Net(conv(), normalizer("rms", 32), lambda net, y, z: z * net.norm.bias.sum()), "shares"),
        (lambda: Net(tied(conv()), normalizer("rms", 32)), "shares"),
    ],
)
def test_what_others_read_or_share_stays(model: Callable[[], Net], reason: str) -> None:
    result = untouched(*narrowing(model(), X)[::-1])
    assert [(note.code, note.site) for note in result.notes] == [("PN126", "norm")]
    assert reason in result.notes[0].message


def with_value(model: Net, value: float) -> Net:
    torch.nn.init.constant_(model.linear.weight[0], value)
    return model


@pytest.mark.parametrize(
    "model",
    [
        lambda: Net(conv(32, groups=1, bias=False), nn.Identity()),
        lambda: Net(conv(33, groups=3), normalizer("rms", 33)),
        lambda: Net(conv(16), normalizer("rms", 16)),  # of 16, or more
        lambda: Net(conv(24, kernel=3), normalizer("rms", 24)),  # of 27 values
        lambda: Net(conv(32), normalizer("rms", 32, 2)),
        lambda: Net(conv(32), nn.InstanceNorm2d(32)),
        lambda: Net(nn.ConvTranspose2d(3, 32, 1), normalizer("rms", 32)),
        lambda: with_value(Net(conv(32), normalizer("rms", 32)), float("nan")),
        lambda: with_value(Net(conv(32), normalizer("rms", 32)), float("inf")),
        lambda: Net(torch.nn.utils.parametrizations.weight_norm(conv(32)), normalizer("rms", 32)),
    ],
)
def test_what_is_no_expansion_or_cannot_be_computed_stays(model: Callable[[], Net]) -> None:
    assert untouched(*narrowing(model(), X)[::-1]).notes == ()


def test_a_weight_of_zeros_stays() -> None:
    linear = conv(bias=False)
    nn.init.zeros_(linear.weight)
    assert untouched(*narrowing(Net(linear, normalizer("rms", 32)), X)[::-1]).notes == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays(dtype: torch.dtype) -> None:
    gm = traced(Net(conv(), normalizer("group", 32)).to(dtype).eval())
    assert untouched(NormalizeBeforeExpansion({"norm": (3, 32, 6, 6)}), gm).notes == ()


@pytest.mark.parametrize("shape", [(), (32, 6, 6), (3, 6, 32)])
def test_what_has_no_batch_of_channels_stays(shape: tuple[int, ...]) -> None:
    """Unknown, one sample that a convolution takes for one, and features on the last axis."""
    linear = nn.Linear(6, 32) if shape[-1:] == (32,) else conv()
    gm = traced(Net(linear, normalizer("rms", 32)).double().eval())
    assert untouched(NormalizeBeforeExpansion({"norm": shape}), gm).notes == ()


def test_tensors_without_values_stay() -> None:
    with torch.device("meta"):
        model = Net(nn.Conv2d(3, 32, 1), nn.GroupNorm(1, 32)).eval()
    assert untouched(NormalizeBeforeExpansion({"norm": (3, 32, 6, 6)}), traced(model)).notes == ()


def test_whoever_runs_the_pass_decides_by_size() -> None:
    seen: list[Expansion] = []
    gm, graph_pass = narrowing(
        Net(conv(64), normalizer("group", 64, 2)), X, why_not=lambda found: str(seen.append(found))
    )
    assert [note.message for note in untouched(graph_pass, gm).notes] == ["all 64 channels: None"]
    assert seen == [Expansion(columns=3, channels=64, groups=2, narrow=32, pixels=36)]
