"""A conversion changes outputs on purpose; by how much is measured and reported."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler import cli
from pn_compiler.base.errors import ExportError, VerificationError
from pn_compiler.export import make_session
from pn_compiler.pipeline.fidelity import measure
from pn_compiler.testing import randomize_batch_norms

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    return randomize_batch_norms(net).eval()


@torch.no_grad()
def test_distances_are_those_of_the_formulas() -> None:
    model = classifier()
    converted = pn_compiler.transform(model, X)
    found = measure(model, converted, [X[:4], X[4:]], sites=["1", "4"])
    o, c = model(X).double(), converted.eval()(X).double()
    assert found.relative_l2 == pytest.approx(float((c - o).norm() / o.norm()), rel=1e-4)
    p, q = o.softmax(1), c.softmax(1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-3)
    assert found.same_class == pytest.approx(float((o.argmax(1) == c.argmax(1)).double().mean()))
    assert found.data == "6 samples of the calibration data"


@torch.no_grad()
def test_each_site_is_measured_on_its_own_input() -> None:
    model = classifier()
    converted = pn_compiler.transform(model, X, norm="layer")
    errors = {site.name: site.error for site in pn_compiler.sites(converted)}
    for name in ("1", "4"):
        x = model[: int(name)](X)  # type: ignore[index]
        norm, new = model.get_submodule(name), converted.get_submodule(name)
        actual = F.layer_norm(x, x.shape[1:]) * new.weight.view(-1, 1, 1) + new.bias.view(-1, 1, 1)
        expected = norm(x)
        assert errors[name] == pytest.approx(float((actual - expected).norm() / expected.norm()), rel=1e-4)


def test_nothing_moved_where_instances_are_like_the_population() -> None:
    """All instances are one instance, whose statistics the BatchNorm has."""
    net = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1)).eval()
    x = torch.randn(1, 4, 64)
    net[0].running_mean.copy_(x.mean((0, 2)))
    net[0].running_var.copy_(x.var((0, 2), correction=0))
    with torch.no_grad():
        net[0].weight.uniform_(0.5, 2)
    converted = pn_compiler.transform(net, x)
    found = measure(net, converted, x, sites=["0"])
    assert found.relative_l2 is not None
    assert found.relative_l2 < 1e-4
    assert found.sites["0"] < 1e-4
    assert found.kl is None
    assert found.advice.endswith("there is nothing to recover")


def test_notes_and_advice() -> None:
    def note(converted: nn.Module) -> str:
        return next(str(n) for n in pn_compiler.notes(converted) if n.code == "PN212")

    model = classifier()
    example = note(pn_compiler.transform(model, X))
    assert "on the example inputs" in example
    assert "says nothing about accuracy" in example
    assert "--calibrate" in example
    calibrated = note(pn_compiler.transform(model, warm_start="calibrate", calibration=[X]))
    assert "on 6 samples of the calibration data" in calibrated
    assert "--distill" in calibrated
    assert "train the converted network" in note(pn_compiler.transform(model, X, warm_start="none"))


def test_networks_are_left_as_they_were() -> None:
    model = classifier().train()
    converted = pn_compiler.transform(model, X)
    before = copy.deepcopy((model.state_dict(), converted.state_dict()))
    measure(model, converted, [X], sites=["1", "4"])
    for state, old in zip((model.state_dict(), converted.state_dict()), before, strict=True):
        assert all(torch.equal(state[name], old[name]) for name in old)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_last_lines_state_both_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(classifier(), tmp_path / "m.pt")
    report = tmp_path / "r.json"
    arguments = [str(tmp_path / "m.pt"), "-o", str(tmp_path / "m.onnx"), "--input-shape", "1,3,8,8"]
    assert cli.main([*arguments, "--report", str(report)]) == cli.DONE
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    moved, verified, advice = (lines[label] for label in ("fidelity", "verified", "next"))
    assert moved.startswith("fidelity    to the original: outputs moved by ")
    assert "KL divergence" in moved
    assert "most enters at" in moved
    assert verified.startswith("verified    largest error ")
    assert advice.startswith(
        "next        this says nothing about accuracy, of which real networks lose at most 1 point"
    )
    assert "--calibrate DATA --distill 150" in advice
    content = json.loads(report.read_text())
    assert 0 < content["fidelity"]["relative_l2"] < 10
    assert set(content["fidelity"]["sites"]) == {"1", "4"}
    assert all(site["error"] > 0 for site in content["sites"])


def test_the_report_measures_what_was_distilled(tmp_path: Path) -> None:
    model, data = classifier(), torch.randn(64, 3, 8, 8)
    plain = pn_compiler.compile(model, tmp_path / "a.onnx", X, calibration=[data], warm_start="calibrate")
    better = pn_compiler.compile(model, tmp_path / "b.onnx", X, calibration=[data], distill_steps=100)
    assert better.fidelity.representative
    assert better.fidelity.data == "64 samples of the calibration data, most of which it was trained on"
    assert plain.fidelity.data == "64 samples of the calibration data"
    for report in (plain, better):
        lost = 100 * (1 - report.fidelity.same_class)
        assert f"on these samples it cost at most {lost:.1f} points of accuracy; --distill" in str(report)
    with torch.no_grad():
        assert better.fidelity.kl < measure(model, pn_compiler.transform(model, X), [data]).kl  # type: ignore[operator]
    assert plain.fidelity.kl is not None


class Chaotic(nn.Module):
    """Amplifies rounding to some tenths of the output, in PyTorch as well."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.conv, self.steps = nn.Conv2d(3, 4, 1), steps

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.conv(x))
        for _ in range(self.steps):  # the logistic map doubles an error in every step
            y = 3.99 * y * (1 - y)
        return y


def test_a_file_that_is_far_off_is_never_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pn_compiler.export_onnx(Chaotic(6).eval(), tmp_path / "good.onnx", X)
    with pytest.raises(VerificationError, match=r"limit 1\.0e-02; PyTorch itself"):
        pn_compiler.export_onnx(Chaotic(24).eval(), tmp_path / "m.onnx", X)
    assert not (tmp_path / "m.onnx").exists()


def test_a_model_that_draws_random_numbers_is_told_so(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(VerificationError, match="draws random numbers"):
        pn_compiler.export_onnx(Noisy(), tmp_path / "m.onnx", X)


# Outputs of every form ------------------------------------------------------------------------------


class Shaped(nn.Module):
    """Gives the map of a small network in another form."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.form = form
        randomize_batch_norms(self).eval()

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(torch.relu(self.bn(self.conv(x)))))


class Pair(NamedTuple):
    maps: Tensor
    means: Tensor


@dataclasses.dataclass
class Result:
    maps: Tensor
    means: Tensor | None = None


@pytest.mark.parametrize(
    "form",
    [
        lambda y: {"out": y, "aux": {"means": y.mean((2, 3))}},
        lambda y: (y, [y.mean((2, 3)), None], y.flatten(1)),
        lambda y: Pair(y, y.mean((2, 3))),
        lambda y: Result(y, y.mean((2, 3))),
        Result,
        lambda y: {"out": y, "name": "maps", "count": 3},
        lambda y: (y, y.argmax(1)),
        lambda y: torch.fft.fft2(y, norm="ortho"),
    ],
)
@torch.no_grad()
def test_the_distance_is_that_of_the_worst_output(form: Callable[[Tensor], Any]) -> None:
    """The means of the network move by less than its maps; a Fourier transform keeps distances."""
    model, plain = Shaped(form), Shaped(lambda y: y)
    found = measure(model, pn_compiler.transform(model, X), [X])
    o, c = plain(X).double(), pn_compiler.transform(plain, X).eval()(X).double()
    assert found.relative_l2 == pytest.approx(float((c - o).norm() / o.norm()), rel=1e-4)
    assert found.not_compared == ()


@pytest.mark.parametrize(("form", "name"), [(lambda y: y.argmax(1), "int"), (lambda y: y > 0, "bool")])
@torch.no_grad()
def test_whole_numbers_are_counted(form: Callable[[Tensor], Tensor], name: str, tmp_path: Path) -> None:
    model = Shaped(form)
    converted = pn_compiler.transform(model, X, norm="layer").eval()
    found = measure(model, converted, [X[:4], X[4:]])
    same = (model(X) == converted(X)).double().mean()
    assert found.relative_l2 is None
    assert found.unchanged == pytest.approx(float(same))
    assert 0.5 < found.unchanged < 1
    report = pn_compiler.compile(model, tmp_path / "m.onnx", X, norm="layer")
    assert f"{100 * found.unchanged:.1f} % of the whole numbers stay the same" in str(report)
    assert report.outputs[0]["dtype"].startswith(name)


@torch.no_grad()
def test_outputs_that_cannot_be_compared_are_named() -> None:
    """As boxes, of which there are other numbers after a conversion."""
    model = Shaped(lambda y: {"boxes": y[y > 0.1], "maps": y})
    found = measure(model, pn_compiler.transform(model, norm="layer", leaves=["conv"]), [X])
    assert found.not_compared == ("output['boxes']",)
    assert "output['boxes']" in str(found)
    assert found.relative_l2 is not None


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda y: None, "returns no tensor"),
        (lambda y: (), "returns no tensor"),
        (lambda y: (y, 3), r"output\[1\] is of type int"),
        (lambda y: {"y": y, "name": "maps"}, r"output\['name'\] is of type str"),
        (Result, "output is of type Result"),
    ],
)
def test_outputs_that_no_file_gives(form: Callable[[Tensor], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        pn_compiler.compile(Shaped(form), tmp_path / "m.onnx", X)
    assert [*tmp_path.iterdir()] == []


def test_complex_outputs_are_verified_as_pairs_of_numbers(tmp_path: Path) -> None:
    report = pn_compiler.compile(Shaped(torch.fft.fft2), tmp_path / "m.onnx", X)
    assert report.outputs[0]["shape"] == ["batch", 4, 6, 6, 2]
    assert report.max_error is not None
    assert report.max_error < 1e-5


def test_outputs_without_values_have_not_stayed_the_same() -> None:
    """A detector that finds nothing, before and after."""
    model = Shaped(lambda y: {"boxes": y[:, :0], "labels": y[:, :0].long()})
    converted = pn_compiler.transform(model, X)
    found = measure(model, converted, [X])
    assert (found.relative_l2, found.unchanged) == (None, None)
    assert "hold no values" in str(found)
    assert "PN211" in {note.code for note in pn_compiler.notes(converted)}


class ManyRanks(nn.Module):
    """BatchNorms on [N, C], [N, C, L], [N, C, H, W] and [N, C, D, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv3, self.bn3 = nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.fc, self.bn0, self.head = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        randomize_batch_norms(self).eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn3(self.conv3(x))).mean(2)
        x = torch.relu(self.bn2(self.conv2(x))).mean(2)
        x = torch.relu(self.bn1(self.conv1(x))).mean(2)
        return self.head(torch.relu(self.bn0(self.fc(x))))


@pytest.mark.parametrize("norm", ["layer", "group", "instance"])
@pytest.mark.parametrize("warm_start", ["auto", "calibrate", "none"])
@torch.no_grad()
def test_the_file_moves_outputs_as_the_report_says(norm: Any, warm_start: Any, tmp_path: Path) -> None:
    model, data = ManyRanks(), torch.randn(6, 2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    how: dict[str, Any] = {"example_inputs": data}
    if warm_start == "calibrate":
        how = {"calibration": [data], "input_shape": (2, 2, 4, 6, 6)}
    report = pn_compiler.compile(model, tmp_path / "m.onnx", norm=norm, warm_start=warm_start, **how)
    session = make_session(str(tmp_path / "m.onnx"))
    c = torch.as_tensor(session.run(None, {report.inputs[0]["name"]: data.numpy()})[0]).double()
    o = model(data).double()
    assert report.fidelity.relative_l2 == pytest.approx(float((c - o).norm() / o.norm()), rel=1e-3)
    assert {site.name for site in report.sites} == {"bn3", "bn2", "bn1", "bn0"}
    assert all(site.error is not None for site in report.sites)


def test_boxes_are_no_logits() -> None:
    """There are more rows than samples."""
    model = Shaped(lambda y: {"boxes": y.movedim(1, -1).flatten(0, 2), "logits": y.mean((2, 3))})
    plain = Shaped(lambda y: y.mean((2, 3)))
    found = measure(model, pn_compiler.transform(model, X), [X])
    alone = measure(plain, pn_compiler.transform(plain, X), [X])
    assert (found.kl, found.same_class) == (pytest.approx(alone.kl), alone.same_class)
