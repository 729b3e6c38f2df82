"""Inputs of any dtype, by name or place, and data for networks that take several."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler import cli
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.input_specs import InputSpec
from pn_compiler.testing import assert_same_outputs, randomize_batch_norms

NAME = "tests.data.test_described_inputs"
TOKENS = ("--input", "tokens:int64:1,16")


class Words(nn.Module):
    """Token ids to classes, with an optional mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 4)
        self.conv, self.bn = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        return self.head(torch.relu(self.bn(self.conv(x.transpose(1, 2)))).mean(2))


class Pair(nn.Module):
    """Two images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(left) - self.conv(right)))).mean((2, 3))


def words() -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(Words()).eval()


def pair() -> nn.Module:
    torch.manual_seed(0)
    return randomize_batch_norms(Pair()).eval()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(words().state_dict(), "words.pt")
    torch.save(pair().state_dict(), "pair.pt")
    return tmp_path


WORDS = ("words.pt", "--arch", f"{NAME}:words", "-o", "m.onnx")
PAIR = ("pair.pt", "--arch", f"{NAME}:pair", "-o", "m.onnx")


@pytest.mark.parametrize(
    ("inputs", "kinds"),
    [
        (TOKENS, {"tokens": "tensor(int64)"}),
        (("--input", "int64:2,16"), {"tokens": "tensor(int64)"}),
        (("--input", "tokens:int32:1x16"), {"tokens": "tensor(int32)"}),
        ((*TOKENS, "--input", "mask:bool:1,16"), {"tokens": "tensor(int64)", "mask": "tensor(bool)"}),
        (("--input", "mask:float32:1,16", *TOKENS), {"tokens": "tensor(int64)", "mask": "tensor(float)"}),
    ],
)
def test_integers_and_several_inputs(
    capsys: pytest.CaptureFixture[str], inputs: tuple[str, ...], kinds: dict[str, str]
) -> None:
    status, said = run(capsys, *WORDS, *inputs)
    assert status == cli.DONE, said
    session = onnxruntime.InferenceSession("m.onnx")
    assert {value.name: value.type for value in session.get_inputs()} == kinds
    tokens = torch.randint(50, (5, 16))
    ids = tokens.to(torch.int32 if "int32" in kinds["tokens"] else torch.int64)
    feed = {"tokens": ids.numpy()}
    if "mask" in kinds:
        feed["mask"] = np.ones((5, 16), bool if "bool" in kinds["mask"] else np.float32)
    want = pn_compiler.transform(words(), tokens[:1])(tokens)
    assert_same_outputs(torch.from_numpy(session.run(None, feed)[0]), want)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "an Embedding: describe each, for example --input tokens:int64:1,128"),
        (("--input", "words:int64:1,16"), "forward of Words(tokens"),
        ((*TOKENS, *TOKENS), "same name"),
        (("--input", "tokens:1,16"), "does not run on an input of shape [1, 16]"),
    ],
)
def test_what_does_not_fit(capsys: pytest.CaptureFixture[str], inputs: tuple[str, ...], message: str) -> None:
    status, said = run(capsys, *WORDS, *inputs)
    assert (status, message in said, said.count("\n")) == (cli.FAILED, True, 1), said


@pytest.mark.parametrize("text", ["tokens", "a:b:1,2", "int7:x:1", "1,0", "", "x:float32:", "a b:1,2"])
def test_descriptions_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        InputSpec.parse(text)
    with pytest.raises(SystemExit) as error:
        cli.main([*WORDS, f"--input={text}"])
    assert error.value.code == cli.USAGE


def test_one_way_to_describe_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*WORDS, *TOKENS, "--input-shape", "1,16"])
    assert "leave out --input-shape" in capsys.readouterr().err


def pairs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, 8, 3, 8, 8, generator=generator)) for _ in range(4)]  # type: ignore[misc]


def labelled_pairs() -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    return [(batch, torch.zeros(8, dtype=torch.int64)) for batch in pairs()]


def labelled_triples() -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(*batch, torch.zeros(8, dtype=torch.int64)) for batch in pairs()]


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(1) == labels).float().mean())


def test_batches_for_two_inputs() -> None:
    """As tuples, with labels or without; each way gives the same."""
    options = {"warm_start": "calibrate", "norm": "layer"}
    by_name = [{"left": left, "right": right} for left, right in pairs()]
    want = pn_compiler.transform(pair(), calibration=by_name, **options)
    first = pairs()[0]
    for batches in (pairs(), labelled_pairs(), labelled_triples(), [list(batch) for batch in pairs()]):
        converted = pn_compiler.transform(pair(), calibration=batches, **options)
        assert_same_outputs(converted(*first), want(*first))
        assert str(pn_compiler.diagnose(pair(), batches)) == str(pn_compiler.diagnose(pair(), by_name))
    frozen, _ = pn_compiler.freeze_statistics(want, labelled_pairs(), budget=1.0, metric=accuracy)
    assert frozen(*first).shape == (8, 2)


@pytest.mark.parametrize("data", ["pairs", "labelled_pairs", "labelled_triples"])
def test_two_inputs_on_the_command_line(capsys: pytest.CaptureFixture[str], data: str) -> None:
    source = ("--calibrate", f"{NAME}:{data}", "--allow-data-code")
    status, said = run(capsys, *PAIR, *source)
    assert status == cli.DONE, said
    if data != "pairs":
        metric = ("--static-statistics", "--metric", f"{NAME}:accuracy")
        status, said = run(capsys, *PAIR, *source, *metric)
        assert status == cli.DONE, said
    status, said = run(capsys, *PAIR, "--input", "left:1,3,8,8", "--input", "right:1,3,8,8")
    assert status == cli.DONE, said
    status, said = run(capsys, *PAIR, "--input-shape", "1,3,8,8", "--input-shape", "1,3,8,8")
    assert status == cli.DONE, said
