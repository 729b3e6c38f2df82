"""Files for each target: what is in them, what is refused, and how the fastest is found."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import pn_compiler
from pn_compiler.base.errors import ConfigError, ExportError, VerificationError
from pn_compiler.cli import main
from pn_compiler.export import TARGETS, make_session, relative_error, to_onnx, tuning
from pn_compiler.repository.options import ModelRepository
from pn_compiler.testing import randomize_batch_norms

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(channels: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5),
    )  # fmt: skip
    return randomize_batch_norms(net).eval()  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "pn_compiler" / "tuning.json"


@pytest.mark.parametrize(
    ("target", "opset", "has", "has_not"),
    [
        ("portable", 20, {"InstanceNormalization": 2, "Conv": 4}, {"Add", "GroupNormalization"}),
        (
            "ort-cpu",
            20,
            {"Scan": 1, "Conv": 6, "ReorderOutput": 1},
            {"InstanceNormalization", "GroupNormalization"},
        ),
        (
            "openvino", 20, {"Div": 2, "ReduceMean": 5, "Conv": 2, "Reshape": 1},
            {"InstanceNormalization", "GroupNormalization"},
        ),
        ("cuda", 20, {"InstanceNormalization": 2, "Conv": 2, "Add": 2}, {"GroupNormalization"}),
        ("tensorrt", 20, {"InstanceNormalization": 2, "Conv": 2, "Add": 2}, {"GroupNormalization"}),
    ],
)  # fmt: skip
def test_what_a_target_gets(
    tmp_path: Path, target: Any, opset: int, has: dict[str, int], has_not: set[str]
) -> None:
    report = pn_compiler.compile(network(), tmp_path / "m.onnx", IMAGES, norm="layer", target=target)
    assert (report.target, report.opset_version) == (target, opset)
    assert {name: report.operators_after[name] for name in has} == has
    assert not has_not & report.operators_after.keys()
    assert report.max_error is not None
    assert report.max_error < 1e-5
    assert report.blocked == (2 if target == "ort-cpu" else 0)
    assert ("target  " in str(report)) == (target != "portable")
    proto = onnx.load(tmp_path / "m.onnx")
    if target != "ort-cpu":  # which the reference evaluator does not know
        with torch.no_grad():
            expected = pn_compiler.transform(network(), IMAGES, norm="layer").eval()(IMAGES).numpy()
        (actual,) = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: IMAGES.numpy()})
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "gpu"}, "target='gpu': expected one of 'portable', 'ort-cpu'"),
        ({"target": "ort-cpu", "dtype": "float16"}, "target ort-cpu is for float32"),
        ({"target": "ort-cpu", "external_data": True}, "writes one file"),
        ({"target": "ort-cpu", "verify": False}, "only written verified"),
        ({"target": "auto", "verify": False}, "only written verified"),
        ({"target": "portable", "tune": True}, "use target auto"),
        ({"target": "auto", "threads": 0}, "threads=0: expected at least 1"),
    ],
)
def test_what_a_target_cannot_do_is_said_before_any_work(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pn_compiler.compile(network(), tmp_path / "m.onnx", IMAGES, **options)
    assert list(tmp_path.iterdir()) == []


GIVEN = {"layer": {"norm": "layer"}, "group": {"norm": "group", "num_groups": 4}, "rms": {"norm": "rms"}}
INSTANCES = {"InstanceNormalization": 2, "Reshape": 5, "ReduceMean": 1}
WRITTEN = {
    ("tensorrt", "layer"): INSTANCES,
    ("tensorrt", "group"): INSTANCES,
    ("tensorrt", "rms"): {"ReduceMean": 5, "Sqrt": 2, "Reciprocal": 2, "Reshape": 5},
    ("openvino", "layer"): {"ReduceMean": 5, "Sqrt": 2, "Div": 2, "Reshape": 1},
    ("openvino", "group"): INSTANCES,
    ("openvino", "rms"): {"ReduceSum": 2, "Sqrt": 2, "Div": 2, "Pow": 2, "Reshape": 1},
}


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize(("target", "norm"), WRITTEN)
def test_no_target_gets_group_normalization(tmp_path: Path, target: Any, norm: str, opset: int) -> None:
    path = tmp_path / "m.onnx"
    report = pn_compiler.compile(network(), path, IMAGES, **GIVEN[norm], target=target, opset_version=opset)
    assert report.opset_version == opset
    assert "GroupNormalization" not in report.operators_after
    expected = WRITTEN[target, norm]
    assert {name: report.operators_after.get(name) for name in expected} == expected


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_targets_take_sizes_that_vary(tmp_path: Path, target: Any, norm: str) -> None:
    path = tmp_path / "m.onnx"
    report = pn_compiler.compile(
        network(), path, IMAGES, norm=norm, target=target, opset_version=21,
        dynamic_axes={"input": {2: "height", 3: "width"}},
    )  # fmt: skip
    assert "GroupNormalization" not in report.operators_after
    x = torch.randn(3, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = pn_compiler.transform(network(), IMAGES, norm=norm).double().eval()(x.double()).numpy()
    assert relative_error(make_session(str(path)).run(None, {"input": x.numpy()})[0], expected) < 1e-5


def test_a_file_for_other_blocks_says_so_when_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    pn_compiler.compile(network(), path, IMAGES, target="ort-cpu")
    make_session(str(path))
    proto = onnx.load(path)
    (expected,) = [t for t in proto.graph.initializer if t.name == "block_size_expected"]
    other = np.zeros((1, 2 * expected.dims[1], 1, 1), np.float32)
    expected.CopyFrom(onnx.numpy_helper.from_array(other, expected.name))
    with pytest.raises(Exception, match=r"with blocks of \d+ channels: compile it again on this machine"):
        make_session(proto.SerializeToString())


def test_a_repository_is_not_for_one_kind_of_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="servers load a model repository anywhere"):
        pn_compiler.compile(
            network(), None, IMAGES, target="ort-cpu", repository=ModelRepository(tmp_path / "r", "m")
        )


def test_a_network_that_cannot_use_the_target_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no normalizer can run in the blocked layout"):
        pn_compiler.compile(network(channels=6), tmp_path / "m.onnx", IMAGES, target="ort-cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_layout_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out = to_onnx.in_blocked_layout

    def wrong(proto: onnx.ModelProto, **options: Any) -> tuple[onnx.ModelProto, int]:
        result, count = lay_out(proto, **options)
        (bias,) = [t for t in result.graph.initializer if tuple(t.dims) == (5,)]
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
        return result, count

    monkeypatch.setattr(to_onnx, "in_blocked_layout", wrong)
    with pytest.raises(VerificationError, match="differs from PyTorch"):
        pn_compiler.compile(network(), tmp_path / "m.onnx", IMAGES, target="ort-cpu")
    assert list(tmp_path.iterdir()) == []


def test_tuning_keeps_the_fastest_and_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = tmp_path / "m.onnx"
    plain = pn_compiler.compile(network(), path, IMAGES, target="auto")
    assert (plain.target, plain.tuning) == ("portable", {})  # never measured, and not asked to
    tuned = pn_compiler.compile(network(), path, IMAGES, target="auto", tune=True)
    assert set(tuned.tuning) == {target.name for target in to_onnx.CANDIDATES}
    assert tuned.target == min(tuned.tuning, key=tuned.tuning.__getitem__)
    assert "measured    " in str(tuned)
    assert len(json.loads(cache.read_text())) == 1

    monkeypatch.setattr(to_onnx, "milliseconds", None)  # must not be called
    again = pn_compiler.compile(network(), path, IMAGES, target="auto", tune=True)
    assert (again.target, again.tuning) == (tuned.target, tuned.tuning)
    assert again.max_error is not None


def test_each_candidate_can_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for winner in to_onnx.CANDIDATES:
        times = {target.name: 1.0 + (target is not winner) for target in to_onnx.CANDIDATES}
        monkeypatch.setattr(to_onnx, "milliseconds", lambda *given, times=times: times)
        net = network(channels=16 * (1 + to_onnx.CANDIDATES.index(winner)))  # not in the cache
        report = pn_compiler.compile(net, tmp_path / "m.onnx", IMAGES, target="auto", tune=True)
        assert report.target == winner.name
        make_session(str(tmp_path / "m.onnx"))


def test_a_candidate_that_cannot_be_made_is_left_out(tmp_path: Path) -> None:
    report = pn_compiler.compile(network(channels=6), tmp_path / "m.onnx", IMAGES, target="auto", tune=True)
    assert report.tuning
    assert not any(name.startswith("ort-cpu") for name in report.tuning)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}'])
def test_a_damaged_cache_is_as_none(tmp_path: Path, cache: Path, content: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    report = pn_compiler.compile(network(), tmp_path / "m.onnx", IMAGES, target="auto")
    assert report.target == "portable"
    tuning.TuningCache().put("key", {"portable": 1.0})
    assert tuning.TuningCache().get("key") == {"portable": 1.0}


def test_other_inputs_or_graphs_are_measured_anew(tmp_path: Path) -> None:
    protos = []
    for channels in (16, 32):
        pn_compiler.compile(network(channels), tmp_path / "m.onnx", IMAGES)
        protos.append(onnx.load(tmp_path / "m.onnx"))
    feeds = [{"x": IMAGES.numpy()}, {"x": IMAGES[:1].numpy()}]
    keys = [tuning.fingerprint(*given) for given in itertools.product(protos, feeds, (1, 3))]
    assert len(set(keys)) == 8
    protos[0].graph.initializer[0].raw_data = bytes(len(protos[0].graph.initializer[0].raw_data))
    assert tuning.fingerprint(protos[0], feeds[0], 1) == keys[0]  # weights do not matter


def test_the_command_takes_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(network(), tmp_path / "model.pt")
    command = [str(tmp_path / "model.pt"), "-o", str(tmp_path / "m.onnx"), "--input-shape", "2,3,8,8"]
    assert main([*command, "--target", "ort-cpu"]) == 0
    assert "2 normalizers in the blocked layout" in capsys.readouterr().out
    assert main([*command, "--target", "auto", "--tune"]) == 0
    assert "measured    " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--tune"])
    assert "--tune goes with --target auto" in capsys.readouterr().err


def test_the_parser_knows_all_targets() -> None:
    from pn_compiler.arguments import make_parser

    (action,) = [a for a in make_parser()._actions if a.dest == "target"]
    assert tuple(action.choices) == (*TARGETS, "auto")
