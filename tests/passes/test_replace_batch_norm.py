"""BatchNorm in, normalizer out: what it computes, every refusal, and how many groups it has."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn import quantized

import pn_compiler
from pn_compiler.base.config import TransformConfig
from pn_compiler.base.errors import PostconditionError
from pn_compiler.graph.site_table import site_table
from pn_compiler.graph.warm_start import Calibrated
from pn_compiler.inspection.batch_norms import FixedMode
from pn_compiler.nn import AnchoredNorm
from pn_compiler.passes.convert.replace_batch_norm import ReplaceBatchNorm
from pn_compiler.testing import (
    assert_batch_independent,
    assert_same_outputs,
    randomize_batch_norms,
)
from tests.passes.graphs import called, normalized_by_hand, per_channel, run, traced, untouched

GENERATOR = torch.Generator().manual_seed(1)
IMAGES = torch.randn(3, 3, 8, 8, generator=GENERATOR)
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def trained(channels: int, rank: int = 2, **options: Any) -> nn.Module:
    return randomize_batch_norms(NORMS[rank](channels, **options)).double().eval()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_a_warm_start_computes_what_the_batch_norm_did(rank: int, affine: bool, groups: int) -> None:
    """Of inputs each of which has the running statistics; of others it is a normalizer with that affine."""
    norm = trained(4, rank, affine=affine, eps=1e-3)
    mean, var = norm.running_mean, norm.running_var
    noise = torch.randn(3, 4, *[5] * rank, dtype=torch.float64)
    x = normalized_by_hand(noise, 4, 0.0)
    x = x * per_channel(var.sqrt(), x) + per_channel(mean, x)
    gm = traced(nn.Sequential(norm), x)
    result = run(ReplaceBatchNorm(TransformConfig(num_groups=groups)), gm)
    assert result.rewritten == 1
    assert not result.notes
    assert called(gm) == [nn.GroupNorm]
    assert_same_outputs(gm(x), norm(x))
    assert_batch_independent(gm, noise)
    new = gm.get_submodule("0")
    expected = normalized_by_hand(noise, groups, 1e-3)
    expected = expected * per_channel(new.weight, x) + per_channel(new.bias, x)
    assert_same_outputs(gm(noise), expected)


@torch.no_grad()
def test_from_scratch_weight_and_bias_are_kept() -> None:
    norm = trained(4)
    gm = traced(nn.Sequential(norm))
    assert run(ReplaceBatchNorm(TransformConfig(norm="layer", warm_start="none")), gm).rewritten == 1
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = normalized_by_hand(x, 1, norm.eps)
    assert_same_outputs(gm(x), expected * per_channel(norm.weight, x) + per_channel(norm.bias, x))
    assert not site_table(gm)["0"].warm_start


def test_calibrated_affines_are_taken_and_bad_fits_reported() -> None:
    fits = {
        str(i): Calibrated(torch.full((4,), 2.0), torch.full((4,), -1.0), residual)
        for i, residual in enumerate((0.01, 0.5))
    }
    gm = traced(nn.Sequential(trained(4), trained(4)))
    result = run(ReplaceBatchNorm(TransformConfig(warm_start="calibrate"), fits), gm)
    assert [(note.code, note.site) for note in result.notes] == [("PN209", "1")]
    assert [(site.residual, site.code) for site in site_table(gm).values()] == [(0.01, None), (0.5, "PN209")]
    for path in ("0", "1"):
        new = gm.get_submodule(path)
        assert (new.weight == 2).all()
        assert (new.bias == -1).all()


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's: known by its name."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Custom(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.running_mean.sum()


def hooked(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda *_: None)
    return norm


def with_statistics(name: str, value: float) -> nn.Module:
    norm = nn.BatchNorm2d(3)
    getattr(norm, name)[1] = value
    return norm


def scripted() -> nn.Module:
    return torch.jit.trace(nn.BatchNorm2d(3).eval(), IMAGES)


REFUSED: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "frozen": ("PN103", FrozenBatchNorm2d),
    "no statistics": ("PN104", lambda: nn.BatchNorm2d(3, track_running_stats=False)),
    "a forward of its own": ("PN105", lambda: Custom(3)),
    "one value": ("PN107", lambda: nn.BatchNorm1d(1)),
    "hooks": ("PN108", lambda: hooked(nn.BatchNorm2d(3))),
    "mean nan": ("PN109", lambda: with_statistics("running_mean", float("nan"))),
    "variance inf": ("PN109", lambda: with_statistics("running_var", float("inf"))),
    "variance negative": ("PN109", lambda: with_statistics("running_var", -0.1)),
    "TorchScript": ("PN111", scripted),
    "quantized": ("PN111", lambda: quantized.BatchNorm2d(3)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:torch.ao:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_code_and_left_as_it_is(name: str) -> None:
    code, build = REFUSED[name]
    gm = traced(nn.Sequential(nn.Identity()))
    norm = build()
    gm.set_submodule("0", norm)  # some of them are what tracing leaves whole, or rewrites
    graph_pass = ReplaceBatchNorm(TransformConfig(warm_start="running_stats"))
    result = untouched(graph_pass, gm)
    assert [(note.code, note.site) for note in result.notes] == [(code, "0")]
    assert gm.get_submodule("0") is norm
    assert [(s.name, s.kind, s.code) for s in site_table(gm).values()] == [("0", "skipped", code)]


def test_a_norm_that_untraced_code_calls_too_is_refused() -> None:
    gm = traced(nn.Sequential(trained(3), trained(3)))
    result = run(ReplaceBatchNorm(TransformConfig(), left_alone=frozenset({"1"})), gm)
    assert [(note.code, note.site) for note in result.notes] == [("PN101", "1")]
    assert called(gm) == [AnchoredNorm, nn.BatchNorm2d]


class Reads(nn.Module):
    """A BatchNorm whose parameters or statistics are read beside it, and a `batch_norm` on them."""

    def __init__(self, read: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.bn, self.other, self.read = nn.BatchNorm2d(3), nn.BatchNorm2d(3), read

    def forward(self, x: Tensor) -> Any:
        return self.read(self, x)


READS: dict[str, tuple[list[tuple[str, str]], Callable[[Any, Tensor], Any]]] = {
    "weight": ([("PN105", "bn")], lambda m, x: (m.bn(x), m.bn.weight.abs())),
    "statistics": ([("PN105", "bn")], lambda m, x: m.bn(x) + m.bn.running_var.sum()),
    "mixed owners": (
        [("PN106", "bn")],
        lambda m, x: F.batch_norm(x, m.bn.running_mean, m.bn.running_var, m.other.weight, m.other.bias),
    ),
    "no owner": ([("PN106", "batch_norm")], lambda m, x: F.batch_norm(x, None, None, training=True)),
}


@pytest.mark.parametrize("name", READS)
def test_norms_that_a_normalizer_cannot_replace(name: str) -> None:
    expected, read = READS[name]
    gm = traced(Reads(read))
    result = untouched(ReplaceBatchNorm(TransformConfig()), gm)
    assert [(note.code, note.site) for note in result.notes] == expected


def opaque(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True) if x.sum() > 0 else x


def test_a_function_that_calls_batch_norm_is_reported() -> None:
    gm = traced(nn.Sequential(nn.ReLU()))
    (relu,) = (node for node in gm.graph.nodes if node.op == "call_module")
    relu.op, relu.target = "call_function", opaque  # as torch.fx.wrap leaves it
    gm.recompile()
    result = untouched(ReplaceBatchNorm(TransformConfig()), gm)
    assert [note.code for note in result.notes] == ["PN120"]


def test_a_norm_without_a_record_breaks_the_promise() -> None:
    with pytest.raises(PostconditionError, match="0 is a BatchNorm"):
        ReplaceBatchNorm(TransformConfig()).ensures(traced(nn.Sequential(trained(3))))


def test_a_fixed_mode_ends_with_its_norm() -> None:
    norm = FixedMode.of(nn.BatchNorm2d(3), training=True)
    gm = traced(nn.Sequential(norm)).eval()
    run(ReplaceBatchNorm(TransformConfig(warm_start="none")), gm)
    assert not gm.get_submodule("0").training


def test_dtype_and_modes_are_kept_and_the_caller_keeps_the_model() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        norm = randomize_batch_norms(nn.BatchNorm2d(3, eps=1e-2)).to(dtype).train()
        before = copy.deepcopy(norm.state_dict())
        gm = traced(nn.Sequential(norm))
        run(ReplaceBatchNorm(TransformConfig()), gm)
        new = gm.get_submodule("0")
        assert (new.weight.dtype, new.eps, new.training) == (dtype, 1e-2, True)
        assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


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
        expected = pn_compiler.transform(net, warm_start=warm_start, proxy=False)(x)
        assert_same_outputs(converted(x), expected, tolerance=1e-5)


def test_without_running_statistics_only_from_scratch() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Conv2d(3, 2, 1))
    (site,) = pn_compiler.sites(pn_compiler.transform(net, warm_start="none"))
    assert site.kind == "pn"


def test_frozen_parameters_stay_frozen() -> None:
    net = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(2)))
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    converted = pn_compiler.transform(net)
    assert not any(p.requires_grad for p in converted.get_submodule("0").parameters())
    assert all(p.requires_grad for p in converted.get_submodule("1").parameters())
