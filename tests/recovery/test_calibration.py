"""The calibrated warm start: exact where it can be, streaming, and it leaves nothing behind."""

import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pn_compiler
from pn_compiler.base.errors import ConfigError
from pn_compiler.cli import main
from pn_compiler.data.samples import Samples
from pn_compiler.numerics.least_squares import ChannelFit, merged
from pn_compiler.recovery.affine_fit import AffineFit, Score, values_of
from pn_compiler.running.evaluation import Shards
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms, relative_error
from tests.zoo import small, timm


class Untraceable(nn.Module):
    """Branches on values: only its parts can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.block(x if x.mean() > -100 else -x)


class Functional(nn.Module):
    """F.batch_norm, an activation that works in place, and a BatchNorm that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        x = F.batch_norm(
            self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps
        )
        x = F.relu_(x)
        return self.shared(F.silu(self.shared(x), inplace=True))


class Selecting(nn.Module):
    """Gives as many rows as it finds, as a detector does."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(2).transpose(1, 2).flatten(0, 1)
        return x[x[:, 0] > 0]


def resnet() -> nn.Module:
    return small("resnet")


def small_resnet() -> nn.Module:
    return timm().create_model("test_resnet", num_classes=10)


def mobilenet() -> nn.Module:
    return small("mobilenet")


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def trained(make, shape=(3, 32, 32)) -> tuple[nn.Module, Tensor]:
    """A network in eval mode with made-up statistics, and samples."""
    torch.manual_seed(0)
    return randomize_batch_norms(make()).eval(), torch.randn(12, *shape)


def calibrated(model: nn.Module, batches, **options) -> nn.Module:
    return pn_compiler.transform(model, warm_start="calibrate", calibration=batches, **options)


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("make", [resnet, mobilenet, Untraceable, Functional])
def test_it_is_exact_where_instances_have_the_statistics_of_the_population(make, num_groups) -> None:
    """Copies of one image: an instance is the population, so a normalizer can do what the BatchNorm does."""
    model, x = trained(make)
    model, x = model.double(), x[:1].double().expand(4, -1, -1, -1).contiguous()
    converted = calibrated(model, [x, x[:2]], num_groups=num_groups)
    sites = pn_compiler.sites(converted)
    assert all(site.warm_start for site in sites)
    plain = pn_compiler.transform(model, warm_start="running_stats", num_groups=num_groups)
    if make is Functional:  # two populations in one module: the best it can
        assert relative_error(converted(x), model(x)) < 0.5 * relative_error(plain(x), model(x))
        return
    assert_same_outputs(converted(x), model(x), tolerance=1e-8)
    assert max(site.residual for site in sites) < 1e-12
    assert relative_error(plain(x), model(x)) > 0.01  # it is the calibration that does it


def test_weight_and_bias_are_the_least_squares() -> None:
    model, x = trained(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    converted = calibrated(model, x.split(5), num_groups=2)
    n = F.group_norm(model[0](x).detach(), 2).double().transpose(0, 1).flatten(1)
    t = model(x).detach().double().transpose(0, 1).flatten(1)
    site = pn_compiler.sites(converted)[0]
    left = total = 0.0
    for channel in range(8):
        columns = torch.stack([n[channel], torch.ones_like(n[channel])], 1)
        solution = torch.linalg.lstsq(columns, t[channel, :, None])
        slope, intercept = solution.solution.flatten().tolist()
        actual = [p[channel].item() for p in converted.get_submodule("1").parameters()]
        assert actual == pytest.approx([slope, intercept], rel=1e-5, abs=1e-6)
        left += float((columns @ solution.solution - t[channel, :, None]).square().sum())
        total += float((t[channel] - t[channel].mean()).square().sum())
    assert site.residual == pytest.approx(left / total, rel=1e-4)


def test_sites_make_up_for_each_other() -> None:
    """All are fitted together, to the outputs of the network: nearer than by running statistics."""
    model, x = trained(lambda: nn.Sequential(*[
        layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    ]))  # fmt: skip
    x = x * torch.linspace(0.3, 3, 12)[:, None, None, None]  # instances unlike each other
    converted = calibrated(model, x.split(4))
    plain = pn_compiler.transform(model, warm_start="running_stats")
    assert relative_error(converted(x), model(x)) < 0.5 * relative_error(plain(x), model(x))
    assert all(site.residual > 0 for site in pn_compiler.sites(converted))


class Deciding(Selecting):
    """Gives integers only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).argmax(1)


def test_outputs_without_gradients_are_replaced_by_the_sites() -> None:
    model, x = trained(Deciding)
    model, x = model.double(), x[:1].double().expand(4, -1, -1, -1).contiguous()
    plain = pn_compiler.transform(model, warm_start="running_stats")
    assert not torch.equal(plain(x), model(x))
    assert torch.equal(calibrated(model, [x, x[:2]])(x), model(x))


def test_outputs_that_cannot_be_compared_are_replaced_by_the_sites() -> None:
    model, x = trained(Selecting)
    model, x = model.double(), x[:1].double().expand(4, -1, -1, -1).contiguous()
    plain = pn_compiler.transform(model, warm_start="running_stats")
    assert len(plain(x)) != len(model(x))
    converted = calibrated(model, [x, x[:2]])
    assert_same_outputs(converted(x), model(x), tolerance=1e-8)


def test_a_model_without_batch_norm_has_nothing_to_calibrate() -> None:
    converted = calibrated(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), [torch.randn(2, 3, 8, 8)])
    assert {note.code for note in pn_compiler.notes(converted)} == {"PN100"}


@pytest.mark.parametrize("make", [small_resnet, Untraceable, Functional])
def test_streaming_gives_what_the_whole_gives(make) -> None:
    model, x = trained(make)
    model, x = model.double(), x.double()  # a descent goes far with the rounding of float32
    whole, streamed = calibrated(model, [x]), calibrated(model, x.split([1, 2, 4, 5]))
    assert_same_outputs(streamed(x), whole(x), tolerance=1e-6)
    whole, streamed = (
        {s.name: s.residual for s in pn_compiler.sites(m)} for m in (whole, streamed)
    )  # fmt: skip
    assert streamed == pytest.approx(whole, rel=1e-5)


class TwoPlaces(Shards):
    """Each with copies of its own of what is computed."""

    def __init__(self, *places: list[Tensor]) -> None:
        self.places = places

    def __iter__(self):
        return itertools.chain(*self.places)

    def each(self, function):
        return [pickle.loads(pickle.dumps(function))(place) for place in self.places]


def test_sums_of_several_places_give_what_one_gives() -> None:
    model, x = trained(Untraceable)
    model, x = model.double(), x.double()
    one = dict(calibrated(model, x.split(4)).named_parameters())
    many = dict(calibrated(model, TwoPlaces([x[:4]], [x[4:8], x[8:]])).named_parameters())
    assert max(relative_error(many[name], one[name]) for name in one) < 1e-5


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(sum),
    offset=st.sampled_from([0.0, 1e2, -1e3]),
    scale=st.sampled_from([1e-2, 1.0, 1e3]),
)
@settings(max_examples=40, deadline=None)
def test_sums_do_not_depend_on_how_samples_come(sizes, offset, scale) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    x = offset + scale * torch.randn(sum(sizes), 3, 4, generator=generator, dtype=torch.float64)
    y = 2 * x - 1 + scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    whole, in_turn = ChannelFit(), ChannelFit()
    whole.add(x, y)
    shards = []
    for piece_x, piece_y in zip(x.split(sizes), y.split(sizes), strict=True):
        in_turn.add(piece_x, piece_y)
        shards.append({"": ChannelFit()})
        shards[-1][""].add(piece_x, piece_y)
    default = torch.ones(3)
    variance = (y - y.mean((0, 2), keepdim=True)).square().sum()
    expected = float((x - y).square().sum() / variance)
    for parts in (in_turn, merged(shards[::-1])[""]):
        assert parts.count == whole.count == 4 * sum(sizes)
        assert_same_outputs(parts.solve(default), whole.solve(default), tolerance=1e-8)
        assert parts.difference() == pytest.approx(whole.difference(), rel=1e-6, abs=1e-12)
        assert parts.difference() == pytest.approx(expected, rel=1e-6)
    for channel, slope in enumerate(whole.solve(default)[0]):
        expected = np.polyfit((x[:, channel].flatten() - x.mean()) / scale, y[:, channel].flatten(), 1)[0]
        assert float(slope) == pytest.approx(expected / scale, rel=1e-6)


def test_a_channel_that_is_constant_keeps_its_slope() -> None:
    fit = ChannelFit()
    fit.add(torch.full((4, 2, 3), 2.0), torch.full((4, 2, 3), 5.0))
    slope, intercept = fit.solve(torch.tensor([3.0, -1.0]))
    assert slope.tolist() == [3, -1]
    assert intercept.tolist() == [-1, 7]
    assert fit.difference() == 0
    model, x = trained(linear, (6,))
    converted = calibrated(model, [torch.zeros_like(x)])  # every channel is constant
    assert all(p.isfinite().all() for p in converted.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype) -> None:
    model, x = trained(linear, (6,))
    model, x = model.to(dtype), x.to(dtype)
    converted = calibrated(model, [x])
    assert {p.dtype for p in converted.parameters()} == {dtype}
    expected = calibrated(model.double(), [x.double()])
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float64: 1e-12}[dtype]
    assert_same_outputs(converted(x), expected(x.double()), tolerance=tolerance)


def test_the_first_sample_tells_the_rank_and_both_paddings_keep_the_function() -> None:
    """BatchNorm1d behind a reshape: without an example the rank of its input is unknown."""
    model, x = trained(linear, (6,))
    converted = calibrated(model, [(x, torch.arange(12))])  # as a DataLoader gives them
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    without = calibrated(model, [x], proxy=False)
    assert_same_outputs(converted(x), without(x), tolerance=1e-5)


def test_large_residuals_are_reported() -> None:
    model, x = trained(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    x = x * torch.tensor([0.01, 10]).repeat(6)[:, None, None, None]  # dark and bright: their ratio is lost
    converted = calibrated(model, [x], norm="layer")
    (site,) = pn_compiler.sites(converted)
    assert site.residual > 0.3
    codes = {note.code for note in pn_compiler.notes(converted)}
    assert "PN209" in codes
    (note,) = (note for note in pn_compiler.notes(converted) if note.code == "PN209")
    assert f"{100 * site.residual:.0f} %" in str(note)


def test_nothing_is_left_behind_when_it_is_interrupted() -> None:
    model, x = trained(resnet)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    class Data:
        reads = 0

        def __iter__(self):
            yield x[:4]
            Data.reads += 1
            if Data.reads == 2:  # in the second sweep: the first sample is not read to the end
                raise KeyboardInterrupt
            yield x[4:]

    random = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, Data())
    assert_same_outputs(model.state_dict(), state, tolerance=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model.training
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled()


def broken(x: Tensor) -> Tensor:
    x = x.clone()
    x[1, 0] = float("nan")
    return x


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda x: None, "give calibration="),
        (lambda x: [], "batches is empty"),
        (lambda x: iter([x]), "can be read once"),
        (lambda x: [broken(x)], "batch 1 holds values that are nan"),
        (lambda x: [x, x[:, :2]], r"does not run on batch 2 \(\[12, 2, 32, 32\] float32\)"),
        (lambda x: [x * 1e37], "makes values that are nan or infinite at"),
    ],
)
def test_bad_data_is_one_clear_error(batches, message) -> None:
    model, x = trained(Functional)
    with pytest.raises(ConfigError, match=message):
        calibrated(model, batches(x), norm="layer")


def test_a_model_without_values_cannot_be_calibrated() -> None:
    with torch.device("meta"):
        model = linear().eval()
    with pytest.raises(ConfigError, match="has no values"):
        calibrated(model, [torch.zeros(2, 6)])


def test_the_command_calibrates_and_distills(tmp_path, capsys) -> None:
    model, x = trained(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    ))  # fmt: skip
    torch.save(model, tmp_path / "model.pt")
    np.save(tmp_path / "data.npy", x.numpy())
    paths = [str(tmp_path / name) for name in ("model.pt", "out.onnx", "report.json", "data.npy")]
    arguments = [
        paths[0],
        "-o",
        paths[1],
        "--report",
        paths[2],
        "--calibrate",
        paths[3],
        "--distill",
        "5",
        "-v",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "residual" in printed.splitlines()[0]
    assert "distilled   5 steps on" in printed
    assert "distilled   output is taken for logits of 5 classes" in printed
    assert main([*arguments, "--distill-logits", "none"]) == 0
    assert "distilled   output is taken for values" in capsys.readouterr().out
    assert main([paths[0], "--dry-run", "--calibrate", paths[3]]) == 0
    assert " %" in capsys.readouterr().out.splitlines()[1]
    unused = ["--calibrate", paths[3], "--distill-logits", "all"]
    for wrong in (["--distill", "5"], ["--mean", "0.5"], unused):
        with pytest.raises(SystemExit) as stopped:
            main([paths[0], "-o", paths[1], *wrong])
        assert stopped.value.code == 2
    for options, message in (
        ({"distill_logits": "all"}, "distill_logits='all' has no effect without distill_steps"),
        ({"distill_logits": "yes"}, "distill_logits='yes': expected one of 'auto', 'all', 'none'"),
    ):
        with pytest.raises(ConfigError, match=message):
            pn_compiler.compile(model, paths[1], calibration=x.split(16), **options)
    missing = str(tmp_path / "none.npy")
    assert main([paths[0], "-o", str(tmp_path / "b.onnx"), "--calibrate", missing]) == 1
    assert "none.npy" in capsys.readouterr().err
    assert not (tmp_path / "b.onnx").exists()


def test_the_command_makes_statistics_constants(tmp_path, capsys) -> None:
    model, x = trained(lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ))  # fmt: skip
    torch.save(model, tmp_path / "model.pt")
    np.save(tmp_path / "data.npy", x.numpy())
    command = [
        str(tmp_path / "model.pt"),
        "-o",
        str(tmp_path / "out.onnx"),
        "--report",
        str(tmp_path / "r.json"),
    ]
    command += ["--calibrate", str(tmp_path / "data.npy"), "-v"]
    for option, budget in (("--static-statistics=all", None), ("--static-statistics", 0.01)):
        assert main([*command, option]) == 0
        printed = capsys.readouterr().out
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["static"]["budget"] == budget
        assert f"of {len(report['static']['sites'])} sites" in printed
        assert report["max_error"] <= 1e-4  # of the file to the network with constants
        if budget is None:
            frozen = report["operators_after"]
            assert all(site["frozen"] for site in report["static"]["sites"])
            assert not {"InstanceNormalization", "GroupNormalization"} & set(frozen)
        else:
            assert report["static"]["error"] <= budget
    for wrong in (["--error-budget", "0.1"], ["--static-statistics", "--error-budget", "-1"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *wrong])
        assert stopped.value.code == 2
    assert main([*command, "--warm-start", "running_stats"]) == 1
    assert "nothing uses them" in capsys.readouterr().err


def test_a_calibration_is_no_worse_on_samples_that_it_does_not_train_on() -> None:
    """Few samples, and a network that running statistics fit well: what is fitted to the samples is not."""
    torch.manual_seed(0)
    model = randomize_batch_norms(small_resnet()).eval()
    x = torch.randn(48, 3, 32, 32)
    traced = pn_compiler.transform(model, warm_start="running_stats", proxy=False)
    names = [site.name for site in pn_compiler.sites(traced)]
    norms = {name: traced.get_submodule(name) for name in names}
    for p in traced.parameters():
        p.requires_grad_(False)
    samples = Samples([((row,), {}) for row in x.split(1)], whole=False)
    fit = AffineFit(traced, model, norms, samples)
    start = fit.propose(values_of(norms))
    for scale in (0.0, 0.5, 1.5):  # worse than the start
        assert fit.propose(scale * values_of(norms)).distance > start.distance
    fit.train(0)
    assert fit.propose(values_of(norms)) == start
    fit.train(12)
    assert fit.propose(values_of(norms)).distance < start.distance


@pytest.mark.parametrize(
    ("score", "kept"),
    [
        (Score(0.5, 0.9), True),
        (Score(0.5, 0.8), False),  # fewer of the teacher's classes than at the start
        (Score(1.5, 1.0), False),
        (Score(math.nan, 1.0), False),
        (Score(0.5, None), True),
    ],
)
def test_what_a_calibration_keeps(score: Score, kept: bool) -> None:
    start = Score(1.0, 0.9)
    assert score.better_than(start, start) == kept
    overflow = Score(math.inf, 0.9)
    assert score.better_than(overflow, overflow) == math.isfinite(score.distance)
