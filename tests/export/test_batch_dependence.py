"""A file whose outputs depend on the batch is not written, unless that is allowed."""

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pn_compiler
from pn_compiler import cli
from pn_compiler.base.errors import BatchDependentError
from pn_compiler.export import batch_dependence
from pn_compiler.running.inputs import Inputs
from pn_compiler.testing import randomize_batch_norms

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, **options)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 1))
    return randomize_batch_norms(net).eval()


class Functional(nn.Module):
    """Calls batch_norm with the statistics of the batch, whatever its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), None, None, training=True)


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Outputs(nn.Module):
    """What it gives has no row for each sample, or depends on random numbers."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mean": x.mean(), "noise": x * 0 + torch.randn_like(x), "same": x}


DEPENDENT = {
    "no statistics": lambda: network(track_running_stats=False),
    "functional": Functional,
    "hand": ByHand,
}


@pytest.mark.parametrize("kind", DEPENDENT)
@pytest.mark.parametrize("verify", [True, False])
def test_it_is_not_written(tmp_path: Path, kind: str, verify: bool) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(BatchDependentError, match=r"PN310: .* --allow-batch-dependent"):
        pn_compiler.compile(DEPENDENT[kind](), path, IMAGES, verify=verify)
    with pytest.raises(BatchDependentError):
        pn_compiler.export_onnx(DEPENDENT[kind](), path, IMAGES, verify=verify)
    assert not list(tmp_path.iterdir())


def test_the_flag_writes_it_and_the_report_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = pn_compiler.compile(network(track_running_stats=False), path, IMAGES, allow_batch_dependent=True)
    assert "PN310" in {note.code for note in report.notes}
    assert "PN310" in report.summary
    session = onnxruntime.InferenceSession(path)
    (whole,) = session.run(None, {"input": IMAGES.numpy()})
    (first,) = session.run(None, {"input": IMAGES[:2].numpy()})
    assert abs(whole[:2] - first).max() > 1e-3  # it is true


def test_a_static_batch_too(tmp_path: Path) -> None:
    path, net = tmp_path / "m.onnx", network(track_running_stats=False)
    with pytest.raises(BatchDependentError):
        pn_compiler.compile(net, path, IMAGES, dynamic_batch=False)
    report = pn_compiler.compile(net, path, IMAGES[:1], dynamic_batch=False)  # one sample has no others
    assert "PN310" not in {note.code for note in report.notes}


def test_what_is_evaluated_with_running_statistics_does_not_depend_on_it(tmp_path: Path) -> None:
    """A BatchNorm that is left alone is a constant there."""
    report = pn_compiler.export_onnx(network(), tmp_path / "m.onnx", IMAGES)
    assert report.notes == ()


@pytest.mark.parametrize("batch", [2, 4])
def test_neither_do_random_numbers_and_outputs_without_rows(batch: int) -> None:
    assert batch_dependence(Outputs(), Inputs((IMAGES[:batch],)), dynamic_batch=False) == 0


def test_integers_complex_numbers_and_nested_inputs() -> None:
    class Tokens(nn.Module):
        def __init__(self, mixed: bool) -> None:
            super().__init__()
            self.mixed, self.embed = mixed, nn.Embedding(9, 4)

        def forward(self, given: dict[str, Tensor]) -> Tensor:
            x = self.embed(given["tokens"])
            x = x + x.roll(1, 0) if self.mixed else x
            return torch.fft.fft(x)

    tokens = Inputs(({"tokens": torch.arange(6).view(2, 3)},))
    assert batch_dependence(Tokens(False), tokens, dynamic_batch=True) == 0
    assert batch_dependence(Tokens(True), tokens, dynamic_batch=True) > 0.01


def test_the_command_has_a_status_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(network(track_running_stats=False), "model.pt")
    arguments = ["model.pt", "-o", "m.onnx", "--input-shape", "1,3,8,8", "--report", "r.json"]
    assert cli.main(arguments) == cli.BATCH_DEPENDENT == 4
    err = capsys.readouterr().err
    assert err.startswith("pn-compile: error: PN310: ")
    assert "1 (PN104) still normalize over the batch" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert cli.main([*arguments, "--allow-batch-dependent"]) == cli.DONE
    assert "PN310" in {note["code"] for note in json.loads(Path("r.json").read_text())["notes"]}
