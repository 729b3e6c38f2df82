"""The latency benchmark on a small network: what it compares, in which runtimes, and how it takes turns."""

import functools
import importlib.util
import json
import re
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from benchmarks import latency, latency_plot, operator_profile, runtimes, variants
from pn_compiler.testing import randomize_batch_norms

needs_openvino = pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="OpenVINO is optional")


#: the variants, each of which makes a file once
MODES = {
    mode: {name: functools.cache(make) for name, make in made.items()} for mode, made in latency.MODES.items()
}


@pytest.fixture
def tiny_network(monkeypatch) -> None:
    monkeypatch.setattr(variants, "build", tiny)
    monkeypatch.setattr(latency, "MODES", MODES)


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 4, 1),
    )  # fmt: skip
    return randomize_batch_norms(net).eval()


def timed_in(runtime: str, mode: str) -> list[str]:
    """The variants that are timed there."""
    found = [v for v in latency.MODES[mode] if variants.RUNTIME_OF.get(v, runtime) == runtime]
    return [v for v in found if (runtime, v) not in latency.CRASHES]


def measured(tmp_path: Path, *flags: str) -> list[dict[str, object]]:
    path = tmp_path / "rows.json"
    arguments = ["--models", "tiny", "--pixels", "16", "--rounds", "2", "--runs", "2", "--json", str(path)]
    assert latency.main([*arguments, *flags]) == 0
    rows: list[dict[str, object]] = json.loads(path.read_text())
    return rows


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize("mode", list(latency.MODES))
def test_the_command_compares_all_variants_of_a_mode(mode, tmp_path, capsys) -> None:
    rows = measured(tmp_path, "--mode", mode, "--threads", "1,2")
    expected = timed_in("onnxruntime", mode)
    assert [(row["threads"], row["variant"]) for row in rows] == [(t, v) for t in (1, 2) for v in expected]
    assert all(row["ratio"] == 1 for row in rows if row["variant"] == "BatchNorm")
    assert all(row["milliseconds"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(printed.count(variant) >= 2 for variant in expected)


@pytest.mark.usefixtures("tiny_network")
def test_some_variants_are_enough(tmp_path) -> None:
    asked = "ort-cpu, after a warm start; pn_compiler, after a warm start"
    rows = measured(tmp_path, "--mode", "exact", "--threads", "1", "--variants", asked)
    assert [row["variant"] for row in rows] == ["BatchNorm", *asked.split("; ")]


@needs_openvino
@pytest.mark.usefixtures("tiny_network")
def test_openvino_is_measured_by_batch_norm_in_openvino(tmp_path) -> None:
    rows = measured(tmp_path, "--mode", "exact", "--threads", "1", "--batches", "1,3", "--openvino")
    for batch in (1, 3):
        there = [(row["runtime"], row["variant"]) for row in rows if row["batch"] == batch]
        assert there == [(r, v) for r in ("onnxruntime", "OpenVINO") for v in timed_in(r, "exact")]
    assert [row["ratio"] for row in rows if row["variant"] == "BatchNorm"] == [1] * 4


@needs_openvino
@pytest.mark.usefixtures("tiny_network")
def test_both_runtimes_compute_the_same() -> None:
    content = latency.MODES["exact"]["pn_compiler, after a warm start"]("tiny", 16, 1)
    images = variants.image("tiny", 16, batch=3).numpy()
    (expected,) = runtimes.onnxruntime_session(content, images, 1)()
    (actual,) = runtimes.openvino_session(content, images, 1)().values()
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("flags", "hidden", "message"),
    [
        (["--openvino"], "openvino", "pip install openvino"),
        (["--plot", "a.png"], "matplotlib.figure", "pip install matplotlib"),
        (["--plot", "a.exe"], "", "expected an ending out of"),
        (["--profile", "resnet18", "ours"], "", "expected one of 'BatchNorm', "),
        (["--variants", "ours"], "", "no variant 'ours': expected some of 'normalizer, plain export', "),
        (["--providers", "rocm"], "", "no provider 'rocm': expected some of cpu, cuda, tensorrt"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(flags, hidden, message, monkeypatch, capsys) -> None:
    if hidden:
        monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(SystemExit):
        latency.main(["--mode", "exact", *flags])
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it is there")
def test_a_provider_that_is_not_there_is_said_at_once(capsys) -> None:
    with pytest.raises(SystemExit):
        latency.main(["--mode", "exact", "--providers", "cpu,cuda"])
    assert "--providers cuda needs onnxruntime-gpu" in capsys.readouterr().err.splitlines()[-1]


def test_the_plot_has_a_panel_for_each_setting_and_a_gap_for_what_is_missing(tmp_path) -> None:
    rows = [
        {"model": model, "batch": 1, "threads": threads, "runtime": "onnxruntime", "variant": v, "ratio": r}
        for threads in (1, 2)
        for model in ("a", "b")
        for v, r in (("BatchNorm", 1.0), ("x", 1.5), ("y", 2.5))
        if (model, v) != ("b", "y")
    ]
    figure = latency_plot.plot(rows)
    figure.savefig(tmp_path / "latency.png")
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title(loc="left")[-9:] for axes in figure.axes] == [" 1 thread", "2 threads"]
    for axes in figure.axes:
        assert [bar.get_height() for bar in axes.patches] == [
            1.5,
            1.5,
            2.5,
            pytest.approx(np.nan, nan_ok=True),
        ]


@pytest.mark.usefixtures("tiny_network")
def test_the_profile_names_each_operator_that_runs(capsys) -> None:
    variant = "pn_compiler, PN everywhere"
    flags = ["--mode", "exact", "--pixels", "16", "--runs", "3", "--batches", "2"]
    assert latency.main([*flags, "--profile", "tiny", variant]) == 0
    printed = capsys.readouterr().out
    content = latency.MODES["exact"][variant]("tiny", 16, 1)
    nodes = operator_profile.profile(content, variants.image("", 16, 2).numpy(), runs=2, warm_up=1)
    operators = Counter(node.operator for node in nodes)
    assert operators["InstanceNormalization"] == 2
    assert operators["Conv"] >= 3
    assert nodes[-1].shape[0] == 2
    for operator, count in operators.items():
        assert re.search(rf"^{operator} +{count} ", printed, re.MULTILINE)


def test_the_profile_leaves_out_warm_up_and_takes_medians() -> None:
    events = [
        {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": {"op_name": operator}}
        for run in ((900, 900, 900), (5, 1, 7), (6, 1, 9), (40, 1, 8))
        for name, operator, dur in zip(("a", "b", "c"), ("Conv", "Relu", "Conv"), run, strict=True)
    ]
    nodes = operator_profile._nodes([{"cat": "Session", "name": "model_run", "dur": 1}, *events], warm_up=1)
    assert [(node.name, node.microseconds) for node in nodes] == [("a", 6), ("b", 1), ("c", 8)]
    lines = [line.split() for line in operator_profile.tables(nodes).splitlines()]
    assert lines[1:4] == [["Conv", "2", "14", "93.3"], ["Relu", "1", "1", "6.7"], ["all", "3", "15", "100.0"]]
    assert [line[0] for line in lines[6:]] == ["c", "a", "b"]


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize("kind", [variants.Compiled, variants.Frozen])
def test_export_options_of_a_variant_arrive(kind) -> None:
    content = kind({"warm_start": "none"}, export={"opset_version": 18})("tiny", 16, 1)
    assert onnx.load_from_string(content).opset_import[0].version == 18


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize("variant", ["warm start", "PN everywhere"])
def test_a_frozen_file_holds_what_a_folded_one_does(variant: str) -> None:
    folded, frozen = (
        [
            node.op_type
            for node in onnx.load_from_string(latency.MODES["static"][name]("tiny", 16, 1)).graph.node
        ]
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
    monkeypatch.setattr(runtimes, "make_session", Session)
    files = {"a": b"a", "b": b"b", "c": b"c"}
    seconds = latency.measure(
        files, np.zeros(1), runtimes.onnxruntime_session, threads=1, rounds=2, runs=1, title=""
    )
    assert b"".join(Session.opened) == b"cbaabc"
    assert [len(times) for times in seconds.values()] == [2, 2, 2]


def test_one_long_bar_leaves_the_others_apart_and_variants_have_names_for_readers() -> None:
    ratios = {"BatchNorm": 1.0, "the same, opset 24": 60.0, "ort-cpu, after a warm start": 1.2, "own": 1.1}
    rows = [
        {"model": "a", "batch": 1, "threads": 1, "runtime": "onnxruntime", "variant": v, "ratio": r}
        for v, r in ratios.items()
    ]
    figure = latency_plot.plot(rows)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    low, high = (axes.transData.transform((0, value))[1] for value in (1.0, 1.2))
    assert (high - low) / axes.bbox.height > 0.03  # on a linear scale 0.002
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == [
        variants.DESCRIPTIONS["the same, opset 24"],
        "compiled for onnxruntime on CPUs, from a trained network",
        "own",
    ]
    assert {v for made in latency.MODES.values() for v in made} <= variants.DESCRIPTIONS.keys()
