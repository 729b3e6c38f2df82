"""Freezing statistics: what must be exact is, errors are those that are reported, and budgets are kept."""

import copy
import json
import math
import pickle
from collections.abc import Iterator

import onnx
import pytest
import torch
from torch import Tensor, fx, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError
from pn_compiler.freezing.static_statistics import _Errors, _Frozen, _longest
from pn_compiler.graph.graph_module import is_converted
from pn_compiler.graph.pass_base import run_pipeline
from pn_compiler.graph.ranks import infer_ranks
from pn_compiler.nn import ConstantAffine, ConstantClamp
from pn_compiler.passes import freeze_pipeline
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms
from tests import zoo

SAMPLES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Five BatchNorms, with an addition, a squeeze and excitation, and zero padding."""

    def __init__(self, *, padding_mode: str = "zeros") -> None:
        super().__init__()

        def conv(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode=padding_mode, bias=False)

        self.conv1, self.bn1, self.act1 = conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.act2 = conv(8, 8), nn.BatchNorm2d(8), nn.ReLU6()
        self.conv3, self.bn3 = conv(8, 8), nn.BatchNorm2d(8)
        self.conv4, self.bn4, self.act4 = conv(8, 12), nn.BatchNorm2d(12), nn.SiLU()
        self.squeeze, self.expand = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.conv5, self.bn5 = conv(12, 8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn3(self.conv3(self.act2(self.bn2(self.conv2(x))))))
        x = self.act4(self.bn4(self.conv4(x)))
        gate = self.expand(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        x = self.bn5(self.conv5(x * gate))
        return self.head(x.mean((2, 3)))


def converted(model: nn.Module | None = None, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = Residual() if model is None else model
    options = {"norm": "layer"} | options
    return pn_compiler.transform(randomize_batch_norms(model).eval(), **options)  # type: ignore[arg-type]


def held_out(total: int, share: float = 0.25) -> tuple[Tensor, Tensor]:
    """Numbers of the held-out samples and of the others."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return order[: round(share * total)], order[round(share * total) :]


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).double().norm() / expected.double().norm())


@pytest.mark.parametrize("padding", ["activation", "output"])
@pytest.mark.parametrize("warm_start", ["none", "auto"])
@pytest.mark.parametrize("groups", [{"norm": "layer"}, {"num_groups": 4}, {"norm": "instance"}])
def test_exact_where_all_instances_have_the_statistics_of_the_population(
    padding: str, warm_start: str, groups: dict[str, object]
) -> None:
    """Shifted copies of one image, in a network whose padding is circular."""
    image = torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shifted = torch.stack([image.roll((i, j), (1, 2)) for i in range(4) for j in range(4)])
    model = Residual(padding_mode="circular").double()
    network = converted(model, warm_start=warm_start, proxy_padding=padding, **groups)
    frozen, report = pn_compiler.freeze_statistics(network, shifted)
    assert report.frozen == len(report.sites) == 5
    assert report.error < 1e-10
    assert report.agreement == 1
    with torch.no_grad():
        assert_same_outputs(frozen(shifted), network(shifted), tolerance=1e-10)
        other = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        assert relative_l2(frozen(other), network(other)) > 1e-3  # whose statistics are others


@pytest.mark.parametrize("padding", ["activation", "output"])
@pytest.mark.parametrize("warm_start", ["none", "auto"])
def test_constants_go_into_the_network_and_change_nothing(padding: str, warm_start: str) -> None:
    """Behind zero padding, too, and in two rounds as in one."""
    folded = pn_compiler.fold(converted(warm_start=warm_start, proxy_padding=padding).double())
    assert isinstance(folded, fx.GraphModule)
    infer_ranks(folded)
    names = [name for name, module in folded.named_modules() if isinstance(module, nn.GroupNorm)]
    constants = {
        name: (torch.randn(channels).double(), torch.randn(channels).double())
        for name in names
        for channels in [folded.get_submodule(name).num_channels]
    }
    swapped = copy.deepcopy(folded)
    for name in names:
        swapped.set_submodule(name, ConstantAffine(*constants[name]))
    x = SAMPLES.double()
    with torch.no_grad():
        expected = swapped(x)
        for part in (names[::2], names):  # half of them first
            run_pipeline(freeze_pipeline({name: constants[name] for name in part}), folded)
        assert_same_outputs(folded(x), expected)
    assert not any(isinstance(module, nn.GroupNorm | ConstantClamp) for module in folded.modules())


def test_damage_rises_and_the_frozen_sites_are_the_first() -> None:
    network = converted()
    whole = pn_compiler.freeze_statistics(network, SAMPLES)[1]
    damages = [site.damage for site in whole.sites if site.damage is not None]
    assert len(damages) == 5
    assert damages == sorted(damages)
    assert damages[0] < damages[-1]
    counts = []
    for budget in (0.0, whole.error / 8, whole.error / 2, 0.99 * whole.error, whole.error):
        _, report = pn_compiler.freeze_statistics(network, SAMPLES, budget=budget)
        assert [site.name for site in report.sites] == [site.name for site in whole.sites]
        assert [site.frozen for site in report.sites] == [i < report.frozen for i in range(5)]
        assert report.error <= budget
        counts.append(report.frozen)
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert 0 < counts[2] < 5
    assert counts[-1] == 5


def test_the_damage_of_a_site_is_that_of_freezing_it_alone() -> None:
    network = converted()
    folded = pn_compiler.fold(network)
    held, rest = held_out(24)
    _, report = pn_compiler.freeze_statistics(network, SAMPLES)
    for site in report.sites:
        norm = folded.get_submodule(site.name)
        seen: list[tuple[Tensor, Tensor]] = []
        handle = norm.register_forward_hook(
            lambda m, args, out, seen=seen: seen.append((args[0], out.clone()))
        )
        with torch.no_grad():
            folded(SAMPLES[rest])
        handle.remove()
        (x, y) = [t.double().transpose(0, 1).flatten(1) for t in seen[0]]
        dx, dy = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        slope = (dx * dy).sum(1) / (dx * dx).sum(1)
        alone = copy.deepcopy(folded)
        constant = ConstantAffine(slope.float(), (y.mean(1) - slope * x.mean(1)).float())
        alone.set_submodule(site.name, constant)
        with torch.no_grad():
            error = relative_l2(alone(SAMPLES[held]), folded(SAMPLES[held]))
        assert site.damage == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("budget", [None, 0.05])
def test_error_and_agreement_are_those_of_the_result_on_the_held_out_samples(budget: float | None) -> None:
    network = converted()
    frozen, report = pn_compiler.freeze_statistics(network, SAMPLES, budget=budget)
    held, rest = held_out(24)
    assert (report.estimation, report.held_out, report.unit) == (len(rest), len(held), "samples")
    with torch.no_grad():
        actual, expected = frozen(SAMPLES[held]), network.eval()(SAMPLES[held])
    assert report.error == pytest.approx(relative_l2(actual, expected), rel=1e-3)
    assert report.agreement == pytest.approx(float((actual.argmax(1) == expected.argmax(1)).double().mean()))
    assert report.frozen > 0


def test_nothing_is_estimated_from_held_out_samples() -> None:
    network = converted()
    held, rest = held_out(24)
    frozen, report = pn_compiler.freeze_statistics(network, SAMPLES)
    for rows, same in ((held, True), (rest, False)):
        changed = SAMPLES.clone()
        changed[rows] = 3 * changed[rows] + 1
        other, elsewhere = pn_compiler.freeze_statistics(network, changed)
        with torch.no_grad():
            assert torch.equal(other(SAMPLES), frozen(SAMPLES)) == same
        assert elsewhere.error != report.error


def test_batches_and_their_form_change_nothing() -> None:
    """One batch, many, a generator that can be read once, a shuffled order that is read once, pairs."""
    network = converted()
    frozen, report = pn_compiler.freeze_statistics(network, SAMPLES, budget=0.05)
    labels = torch.zeros(24)
    for batches in (
        SAMPLES.split(1),
        (batch for batch in SAMPLES.split(5)),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(SAMPLES, labels), batch_size=7),
        [{"x": batch} for batch in SAMPLES.split(24)],
    ):
        again, same = pn_compiler.freeze_statistics(network, batches, budget=0.05)
        assert same == report
        with torch.no_grad():
            assert torch.equal(again(SAMPLES), frozen(SAMPLES))


def test_the_samples_are_a_limit() -> None:
    network = converted()
    report = pn_compiler.freeze_statistics(network, SAMPLES.split(5), max_samples=8, held_out=0.5)[1]
    assert (report.estimation, report.held_out) == (4, 4)
    assert report == pn_compiler.freeze_statistics(network, SAMPLES[:8], held_out=0.5)[1]


def test_budget_zero_freezes_nothing() -> None:
    network = converted()
    frozen, report = pn_compiler.freeze_statistics(network, SAMPLES, budget=0)
    assert (report.frozen, report.error, report.agreement) == (0, 0, 1)
    with torch.no_grad():
        assert torch.equal(frozen(SAMPLES), pn_compiler.fold(network)(SAMPLES))


@pytest.mark.parametrize("total", [0, 1, 2, 5, 53])
def test_the_longest_prefix_within_the_budget(total: int) -> None:
    for longest in {0, 1, total // 3, total - 1, total} & {*range(total + 1)}:
        lengths: list[int] = []

        def freeze(length: int, longest: int = longest, lengths: list[int] = lengths) -> _Frozen:
            lengths.append(length)
            errors = _Errors()
            before = torch.ones(1, 1)
            errors.add(before * (1 if length == 0 else 1.1 if length <= longest else 2), before)
            return _Frozen(nn.Identity(), errors)

        best, result = _longest(total, freeze, 0.5)
        assert result == longest
        assert best.errors.relative_l2 <= 0.5
        assert len(lengths) <= 3 + math.ceil(math.log2(total + 1))


def test_errors_of_several_outputs_are_that_of_the_worst() -> None:
    errors = _Errors()
    before = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([1.0]), "count": torch.tensor([7])}
    errors.add(
        {"a": torch.tensor([[3.0, 3.0]]), "b": torch.tensor([1.5]), "count": torch.tensor([0])}, before
    )
    assert errors.relative_l2 == pytest.approx(0.5)
    errors.add(before, before)
    assert errors.relative_l2 == pytest.approx(0.5 / math.sqrt(2))
    assert errors.agreement is None
    errors.add({**before, "a": torch.full((1, 2), math.nan)}, before)
    assert errors.relative_l2 == math.inf
    with pytest.raises(ConfigError, match=r"output\['b'\] of the model holds nan"):
        errors.add(before, {**before, "b": torch.tensor([math.inf])})
    with pytest.raises(ConfigError, match="no floating-point tensor"):
        _Errors().add(torch.tensor([1]), torch.tensor([1]))


@pytest.mark.parametrize("failure", ["nan", "interrupt", "wrong shape", "one sample", "no sample"])
def test_the_model_is_as_before_whatever_happens(failure: str) -> None:
    network = converted().train()
    state, modules = copy.deepcopy(network.state_dict()), dict(network.named_modules())
    random = torch.get_rng_state()

    def batches() -> Iterator[Tensor]:
        if failure == "no sample":
            return
        yield SAMPLES[:1]
        if failure == "one sample":
            return
        yield SAMPLES[1:4]
        if failure == "interrupt":
            raise KeyboardInterrupt
        yield SAMPLES[4:8, : (2 if failure == "wrong shape" else 3)] / (0 if failure == "nan" else 1)

    expected = {
        "nan": (ConfigError, "batch 3 holds values that are nan or infinite"),
        "interrupt": (KeyboardInterrupt, None),
        "wrong shape": (ConfigError, "does not run"),
        "one sample": (ConfigError, "at least two are needed"),
        "no sample": (ConfigError, "there is no batch"),
    }
    kind, message = expected[failure]
    with pytest.raises(kind, match=message):
        pn_compiler.freeze_statistics(network, batches())
    assert_same_outputs(network.state_dict(), state, tolerance=0)
    assert dict(network.named_modules()) == modules
    assert all(module.training for module in network.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in network.modules())


def test_the_model_is_as_before_on_success_and_the_result_stands_on_its_own() -> None:
    network = converted().train()
    state = copy.deepcopy(network.state_dict())
    frozen, _ = pn_compiler.freeze_statistics(network, SAMPLES)
    assert_same_outputs(network.state_dict(), state, tolerance=0)
    assert network.training
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(module._forward_hooks for module in frozen.modules())
    again = pickle.loads(pickle.dumps(frozen))
    assert torch.equal(again(SAMPLES), frozen(SAMPLES))
    for result in (frozen, again):
        assert [site.static for site in pn_compiler.sites(result)] == [True] * 5
        assert pn_compiler.notes(result) == pn_compiler.notes(network)
    assert not any(site.static for site in pn_compiler.sites(network))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    network = converted().to(dtype)
    frozen, report = pn_compiler.freeze_statistics(network, SAMPLES.to(dtype))
    assert report.frozen == 5
    assert {p.dtype for p in frozen.parameters()} == {dtype}
    with torch.no_grad():
        assert frozen(SAMPLES.to(dtype)).dtype == dtype
    single = pn_compiler.freeze_statistics(converted(), SAMPLES)[1]
    tolerance = {torch.float16: 0.01, torch.bfloat16: 0.1, torch.float64: 1e-4}[dtype]  # relative
    assert report.error == pytest.approx(single.error, rel=tolerance)


def test_a_network_with_group_norm_that_nobody_converted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
    frozen, report = pn_compiler.freeze_statistics(model, SAMPLES)
    assert report.frozen == 1
    assert report.agreement is None  # a map, not logits
    assert not is_converted(frozen)
    assert [type(m) for m in frozen.children()] == [nn.Conv2d, nn.ReLU, nn.Conv2d]


def test_nothing_to_freeze() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    frozen, report = pn_compiler.freeze_statistics(model, SAMPLES)
    assert (report.sites, report.error) == ((), 0)
    assert torch.equal(frozen(SAMPLES), model(SAMPLES))


class Shared(nn.Module):
    """One normalizer, called behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm = nn.GroupNorm(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.norm(self.conv1(x)).relu()))


def test_calls_of_one_site_count_together() -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    frozen, report = pn_compiler.freeze_statistics(model, SAMPLES)
    assert [(site.name, site.frozen) for site in report.sites] == [("norm", True)]
    first, second = (
        frozen.get_submodule(name).weight / model.get_submodule(name).weight for name in ("conv1", "conv2")
    )
    assert_same_outputs(first[:, 0, 0, 0], second[:, 0, 0, 0])  # one scale for both


class Branching(nn.Module):
    """A forward that torch.fx cannot trace, with parts that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.never = (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))
        self.alone = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.alone(self.often(x)) if x.abs().max() < 1e6 else self.never(x)


def test_sites_that_cannot_be_frozen_have_a_reason() -> None:
    network = converted(Branching())
    _, report = pn_compiler.freeze_statistics(network, SAMPLES)
    reasons = {site.name: site.reason for site in report.sites}
    assert report.frozen == 1
    assert reasons["often.1"] == ""
    assert reasons["never.1"] == "the calibration data does not reach it"
    assert "torch.fx cannot trace" in reasons["alone"]
    assert [site.damage is None for site in report.sites] == [False, True, True]


def test_hooks_keep_a_site_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()).eval()
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    frozen, report = pn_compiler.freeze_statistics(model, SAMPLES)
    assert [(site.frozen, site.reason) for site in report.sites] == [(False, "it has hooks")]
    assert torch.equal(frozen(SAMPLES), model(SAMPLES))


class Overflowing(nn.Module):
    """A site whose values are not finite, which the output does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.bad = nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.GroupNorm(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.bad(x * 1e38 * 1e38).nan_to_num(0, 0, 0).sum()


def test_a_site_that_is_not_finite_stays() -> None:
    _, report = pn_compiler.freeze_statistics(Overflowing().eval(), SAMPLES)
    assert [(site.name, site.frozen) for site in report.sites] == [("norm", True), ("bad", False)]
    assert "nan or infinite" in report.sites[1].reason


def test_channels_that_do_not_vary() -> None:
    """Dead channels have no slope: theirs is that of a normalizer with the statistics of all samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.GroupNorm(1, 4)).eval()
    with torch.no_grad():
        model[0].bias[0] = -100  # type: ignore[index]  # a parameter
        x = model[1](model[0](SAMPLES[held_out(24)[1]]))
    frozen, _ = pn_compiler.freeze_statistics(model, SAMPLES)
    scale = frozen.get_submodule("2").scale
    assert isinstance(scale, Tensor)
    assert float(scale[0]) == pytest.approx(float((x.var(correction=0) + 1e-5) ** -0.5), rel=1e-4)


def test_batches_of_unlike_size_stay_whole() -> None:
    network = converted()
    batches = [SAMPLES[:2], SAMPLES[2:4, :, :6], SAMPLES[4:6], SAMPLES[6:8]]
    report = pn_compiler.freeze_statistics(network, batches)[1]
    assert (report.estimation, report.held_out, report.unit) == (3, 1, "batches")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -0.1}, "budget=-0.1"),
        ({"budget": math.nan}, "budget=nan"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"held_out": 0.0}, "held_out=0.0"),
        ({"max_samples": 1}, "max_samples=1"),
    ],
)
def test_impossible_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pn_compiler.freeze_statistics(nn.Identity(), SAMPLES, **options)  # type: ignore[arg-type]


def test_the_report_as_text_and_json() -> None:
    _, report = pn_compiler.freeze_statistics(converted(), SAMPLES, budget=0.05)
    assert 0 < report.frozen < 5
    lines = str(report).splitlines()
    assert lines[0].split() == ["site", "statistics", "damage", "remark"]
    assert [line.split()[0] for line in lines[1:6]] == [site.name for site in report.sites]
    assert f"frozen      {report.frozen} of 5 sites" in lines
    assert f"error       {100 * report.error:.2f} % of the output (relative L2, budget 5 %)" in lines
    content = json.loads(report.to_json())
    assert content["frozen"] == report.frozen
    assert content["sites"][0] == {
        "name": report.sites[0].name, "frozen": True, "damage": report.sites[0].damage, "reason": "",
    }  # fmt: skip


# The exported graph ----------------------------------------------------------------------------------

LINEAR = {"Conv", "Gemm", "Add", "Relu", "Clip", "Sigmoid", "Mul", "MaxPool", "ReduceMean", "Reshape"}
LINEAR |= {"GlobalAveragePool", "Flatten"}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(zoo.small(name)).eval()


@pytest.mark.parametrize(
    ("name", "options", "batch_normalizations"),
    [
        ("resnet", {}, 0),
        ("resnet", {"warm_start": "none"}, 1),  # behind the stem: the first addition reads it as well
        ("resnet", {"warm_start": "none", "proxy_padding": "output"}, 5),  # and one in each block
        ("mobilenet", {}, 0),
        ("mobilenet", {"warm_start": "none"}, 0),
        ("mobilenet", {"warm_start": "none", "proxy_padding": "output"}, 3),  # one in each block
        ("efficientnet", {}, 0),
        ("efficientnet", {"warm_start": "none"}, 3),  # one in front of each gate
        ("efficientnet", {"warm_start": "none", "proxy_padding": "output"}, 6),
    ],
)
def test_everything_frozen_is_convolutions_and_activations(
    name: str, options: dict[str, str], batch_normalizations: int, tmp_path
) -> None:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = small(name)
    expected = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    frozen, report = pn_compiler.freeze_statistics(
        pn_compiler.transform(network, **options),  # type: ignore[arg-type]
        images,
    )
    assert report.frozen == len(report.sites)
    written = pn_compiler.export_onnx(frozen, tmp_path / "model.onnx", images[:2])
    operators = dict(written.operators_after)
    assert operators.pop("BatchNormalization", 0) == batch_normalizations
    assert operators["Conv"] == expected
    assert set(operators) <= LINEAR
    graph = onnx.load(tmp_path / "model.onnx").graph
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            assert {a.name: a.f for a in node.attribute}["epsilon"] == 0
