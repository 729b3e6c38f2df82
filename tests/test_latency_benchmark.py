"""The latency benchmark on a small network: what it compares, and how it takes turns."""

import json
import weakref
from typing import ClassVar

import onnx
import pytest
import torch
from torch import nn

from benchmarks import latency
from pn_compiler.testing import randomize_batch_norms


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    return randomize_batch_norms(net).eval()


@pytest.mark.parametrize("mode", list(latency.MODES))
def test_the_command_compares_all_variants_of_a_mode(mode, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(latency, "build", tiny)
    path = tmp_path / "rows.json"
    arguments = ["--mode", mode, "--models", "tiny", "--threads", "1,2", "--pixels", "16"]
    assert latency.main([*arguments, "--rounds", "2", "--runs", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    variants = list(latency.MODES[mode])
    assert [(row["threads"], row["variant"]) for row in rows] == [(t, v) for t in (1, 2) for v in variants]
    assert all(row["ratio"] == 1 for row in rows if row["variant"] == "BatchNorm")
    assert all(row["milliseconds"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(printed.count(variant) >= 2 for variant in variants)


@pytest.mark.parametrize("variant", ["warm start", "PN everywhere"])
def test_a_frozen_file_holds_what_a_folded_one_does(monkeypatch, variant: str) -> None:
    monkeypatch.setattr(latency, "build", tiny)
    folded, frozen = (
        [node.op_type for node in onnx.load_from_string(latency.MODES["static"][name]("tiny", 16)).graph.node]
        for name in ("BatchNorm", variant)
    )
    assert folded == frozen == ["Conv", "Relu", "Conv", "Clip", "Conv"]


class Session:
    """Stands for an onnxruntime session."""

    alive: ClassVar[weakref.WeakSet["Session"]] = weakref.WeakSet()
    opened: ClassVar[list[bytes]] = []

    def __init__(self, content: bytes, *, threads: int) -> None:
        assert not self.alive, "two sessions at a time"
        self.alive.add(self)
        self.opened.append(content)

    def get_inputs(self) -> list[nn.Module]:
        named = nn.Module()
        named.name = "x"  # type: ignore[assignment]  # any object with a name
        return [named]

    def run(self, names: None, feed: object) -> None:
        pass


def test_sessions_take_turns_and_are_never_two(monkeypatch) -> None:
    monkeypatch.setattr(latency, "make_session", Session)
    files = {"a": b"a", "b": b"b", "c": b"c"}
    seconds = latency.measure(files, torch.zeros(1), threads=1, rounds=2, runs=1, title="")
    assert b"".join(Session.opened) == b"cbaabc"
    assert [len(times) for times in seconds.values()] == [2, 2, 2]
