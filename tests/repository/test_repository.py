"""Model repositories: what is in them, versions, and what is caught before a server sees it."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from google.protobuf import text_format
from onnx import TensorProto, helper
from torch import Tensor, nn
from tritonclient.grpc import model_config_pb2

import pn_compiler
from pn_compiler.base import files
from pn_compiler.base.errors import ConfigError, ExportError, PnCompilerError, VerificationError
from pn_compiler.export import choose_opset, make_session, oldest_onnxruntime, relative_error
from pn_compiler.repository.golden import Golden
from pn_compiler.repository.triton_config import model_config_class

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "net.onnx"
    pn_compiler.export_onnx(network(), path, IMAGES)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model_repository"


def config_of(folder: Path, name: str = "net") -> Any:
    """Read by Triton's whole schema, as tritonclient has it."""
    return text_format.Parse((folder / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_is_written(folder: Path) -> None:
    net = network()
    report = pn_compiler.export_model_repository(net, folder, "net", IMAGES)
    assert {*content(folder)} == {
        "settings.json", "kserve.yaml", "ray_app.py", "net/config.pbtxt", "net/model-settings.json",
        "net/ort_runtime.py", "net/1/model.onnx", "net/1/golden.npz", "net/1/report.json",
    }  # fmt: skip
    assert (report.path, report.repository) == (str(folder / "net/1/model.onnx"), str(folder / "net/1"))
    config = config_of(folder)
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 32)
    assert [(v.name, [*v.dims], v.data_type) for v in (*config.input, *config.output)] == [
        ("input", [3, 8, 8], model_config_pb2.TYPE_FP32),
        ("output", [2, 6, 6], model_config_pb2.TYPE_FP32),
    ]
    settings = json.loads((folder / "net/model-settings.json").read_text())
    assert settings["parameters"] == {"uri": "./1/model.onnx", "version": "1"}
    service = yaml.safe_load((folder / "kserve.yaml").read_text())
    assert service["metadata"]["name"] == "model-repository"
    assert service["spec"]["predictor"]["model"]["storageUri"] == "pvc://models/model_repository"
    told = json.loads((folder / "net/1/report.json").read_text())
    assert (told["opset"], told["ir_version"], told["oldest_onnxruntime"]) == (20, 9, "1.17")
    assert told["files"]["model.onnx"]["sha256"] == content(folder)["net/1/model.onnx"]
    assert told["made"]["golden_outputs"] == "PyTorch"
    assert told["made"]["compilation"]["versions"]["torch"] == torch.__version__


def test_golden_outputs_are_those_of_pytorch(folder: Path) -> None:
    net = network()
    pn_compiler.export_model_repository(net, folder, "net", IMAGES)
    golden = Golden.load(folder / "net/1/golden.npz")
    assert (golden.model, golden.version) == ("net", 1)
    assert [len(inputs["input"]) for inputs, _ in golden.calls] == [1, 3]
    for inputs, outputs in golden.calls:
        with torch.no_grad():
            wide = net.double()(torch.from_numpy(inputs["input"]).double())
        assert outputs["output"].dtype == np.float32
        assert relative_error(outputs["output"], wide.numpy()) < 1e-7


def test_our_part_of_the_schema_is_tritons(file: Path) -> None:
    ours, theirs = model_config_class().DESCRIPTOR.file, model_config_pb2.DESCRIPTOR
    for name, message in ours.message_types_by_name.items():
        for field in message.fields:
            other = theirs.message_types_by_name[name].fields_by_name[field.name]
            assert (field.number, field.type) == (other.number, other.type)
            assert field.is_repeated == other.is_repeated
    known = theirs.enum_types_by_name["DataType"].values_by_name
    for value in ours.enum_types_by_name["DataType"].values:
        assert value.number == known[value.name].number


def test_a_new_version_leaves_the_old_one(folder: Path, file: Path) -> None:
    pn_compiler.export_model_repository(file, folder, "net")
    config = folder / "net/config.pbtxt"
    config.write_text(config.read_text().replace("2000", "5000") + 'parameters { key: "mine" }\n')  # tuned
    before = content(folder)
    report = pn_compiler.export_model_repository(file, folder, "net")
    after = content(folder)
    assert Path(report.repository).name == "2"
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {
        "net/model-settings.json", "net/2/model.onnx", "net/2/golden.npz", "net/2/report.json",
    }  # fmt: skip
    assert Golden.load(folder / "net/2/golden.npz").version == 2
    (folder / "net/2/model.onnx").write_bytes(b"")
    report = pn_compiler.export_model_repository(file, folder, "net", force=True, max_batch_size=8)
    assert Path(report.repository).name == "2"
    assert config_of(folder).max_batch_size == 8
    report = pn_compiler.export_model_repository(file, folder, "small", max_batch_size=2)
    calls = Golden.load(folder / "small/1/golden.npz").calls
    assert [len(inputs["input"]) for inputs, _ in calls] == [1]  # no server of it takes the others
    assert content(folder)["net/2/model.onnx"] == before["net/1/model.onnx"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "kserve.yaml",
        "net",
        "ray_app.py",
        "settings.json",
        "small",
    ]


def test_versions_share_an_interface(folder: Path, file: Path, tmp_path: Path) -> None:
    pn_compiler.export_model_repository(file, folder, "net")
    other = onnx.load(file)
    other.graph.input[0].name = "image"
    next(node for node in other.graph.node if "input" in node.input).input[0] = "image"
    onnx.save(other, tmp_path / "other.onnx")
    before = content(folder)
    with pytest.raises(ExportError, match="describes other inputs than this model has: choose another name"):
        pn_compiler.export_model_repository(tmp_path / "other.onnx", folder, "net")
    assert content(folder) == before
    pn_compiler.export_model_repository(tmp_path / "other.onnx", folder, "net", force=True)
    assert config_of(folder).input[0].name == "image"
    assert not (folder / "net/2").exists()


def test_several_at_once_lose_nothing(folder: Path, file: Path) -> None:
    """Each gets a version of its own, or is told that someone else was faster."""
    done: list[str] = []

    def export() -> None:
        try:
            done.append(pn_compiler.export_model_repository(file, folder, "net").repository)
        except ExportError:
            done.append("")

    threads = [threading.Thread(target=export) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = [name for name in done if name]
    assert len(set(written)) == len(written) >= 1
    assert sorted(written) == sorted(str(p) for p in (folder / "net").iterdir() if p.is_dir())
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        pn_compiler.export_model_repository(file, folder, "net")
    before = content(folder)
    rename = os.rename

    def full(source: Any, target: Any) -> None:
        if Path(target).name in ("net", "1") and files.REPLACED not in (
            *Path(source).parts,
            *Path(target).parts,
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(ExportError, match=r"cannot write .*model_repository: No space left on device"):
        pn_compiler.export_model_repository(file, folder, "net", force=existing)
    assert {k: v for k, v in content(folder).items() if "/" in k} == {
        k: v for k, v in before.items() if "/" in k
    }


@pytest.mark.parametrize("end", [KeyboardInterrupt, signal.SIGKILL])
def test_a_replacement_that_is_cut_off_gives_the_old_version_back(folder: Path, file: Path, end: Any) -> None:
    """By Ctrl-C at once, by SIGKILL at the next run."""
    pn_compiler.export_model_repository(file, folder, "net")
    before = content(folder)
    code = """
import os, sys
import pn_compiler
rename = os.rename
def cut_off(source, target):
    rename(source, target)
    if "old" in str(target).split(os.sep):
        if sys.argv[3] == "9":
            os.kill(os.getpid(), 9)
        raise KeyboardInterrupt
os.rename = cut_off
pn_compiler.export_model_repository(sys.argv[1], sys.argv[2], "net", force=True)
"""
    command = [sys.executable, "-c", code, str(file), str(folder), "9" if end == signal.SIGKILL else ""]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=200)
    assert done.returncode != 0
    if end == signal.SIGKILL:
        assert not (folder / "net" / "1").exists()
        files.write_atomically(folder / "other", b"")
        (folder / "other").unlink()
    assert content(folder) == before


def test_external_data_come_along_in_a_folder(folder: Path, file: Path, tmp_path: Path) -> None:
    big = tmp_path / "big.onnx"
    onnx.save(onnx.load(file), big, save_as_external_data=True, location="w.data", size_threshold=200)
    pn_compiler.export_model_repository(big, folder, "big")
    assert {p.name for p in (folder / "big/1/model.onnx").iterdir()} == {"model.onnx", "w.data"}
    settings = json.loads((folder / "big/model-settings.json").read_text())
    assert settings["parameters"]["uri"] == "./1/model.onnx/model.onnx"
    assert {*json.loads((folder / "big/1/report.json").read_text())["files"]} == {"model.onnx", "w.data"}
    session = make_session(str(folder / "big/1/model.onnx/model.onnx"))
    inputs, outputs = Golden.load(folder / "big/1/golden.npz").calls[-1]
    assert relative_error(session.run(None, inputs)[0], outputs["output"]) < 1e-6
    (tmp_path / "w.data").unlink()
    with pytest.raises(ExportError, match=r"big.onnx keeps weights in w.data, and there is no such file"):
        pn_compiler.export_model_repository(big, folder, "other")
    assert not (folder / "other").exists()


def onnx_file(path: Path, nodes: list[Any], output: list[Any], **constants: Any) -> Path:
    """A hand-made graph from "x" [batch, 2, 2] to "y"."""
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)]
    arrays = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", values, outputs, arrays)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def test_a_fixed_batch_is_not_batched(folder: Path) -> None:
    """Complaint 1: a fixed batch in the file, and batching in the configuration."""
    report = pn_compiler.export_model_repository(network(), folder, "net", IMAGES, dynamic_batch=False)
    config = config_of(folder)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert [*config.input[0].dims] == [2, 3, 8, 8]
    assert "max_batch_size" not in json.loads((folder / "net/model-settings.json").read_text())
    assert "no batching by the server: the first axes are not one dynamic batch" in report.batching


def test_an_output_that_does_not_follow_the_batch(folder: Path, tmp_path: Path) -> None:
    """Complaint 3: a batch baked into the graph, or mixed; neither is ever batched across requests."""
    flatten = onnx_file(
        tmp_path / "rows.onnx",
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        ["rows", 4],
        shape=[-1, 4],
    )
    pn_compiler.export_model_repository(flatten, folder, "rows")
    assert config_of(folder, "rows").max_batch_size == 0
    baked = onnx_file(
        tmp_path / "baked.onnx",
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        ["batch", 4],
        shape=[2, -1],
    )
    pn_compiler.export_model_repository(baked, folder, "baked")
    assert config_of(folder, "baked").max_batch_size == 0
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    mixed = onnx_file(tmp_path / "mixed.onnx", nodes, ["batch", 2, 2], axes=[0])
    report = pn_compiler.export_model_repository(mixed, folder, "mixed")
    assert config_of(folder, "mixed").max_batch_size == 0
    assert (
        report.batching
        == "no batching by the server: the answer to a sample depends on the others of its batch"
    )


class Adds(nn.Module):
    """[N, 4] inputs, of which exactly two fit."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.ones(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows


def test_a_specialised_batch_is_an_error(folder: Path) -> None:
    """Complaint 4: torch.export fixes the batch, or ignores that it is dynamic."""
    with pytest.raises(VerificationError, match=r"the PyTorch model fails at batch 3: .* try a static batch"):
        pn_compiler.export_model_repository(Adds(), folder, "net", torch.randn(2, 4))
    assert not folder.exists()


def test_target_onnxruntime() -> None:
    """Complaint 5: an opset or IR that is newer than the server."""
    assert [choose_opset(None, target) for target in (None, "1.17", "1.18", "1.32")] == [20, 20, 20, 20]
    assert choose_opset(21, "1.18.1") == 21
    with pytest.raises(ConfigError, match=r"onnxruntime 1.18 loads opset 21 at most, not 23"):
        choose_opset(23, "1.18")
    with pytest.raises(ConfigError, match=r"expected a version such as 1.18"):
        choose_opset(None, "new")
    with pytest.raises(ConfigError, match=r"the oldest onnxruntime that can be asked for is 1.17"):
        choose_opset(None, "1.9")
    assert [oldest_onnxruntime(*v) for v in ((20, 9), (20, 10), (21, 10), (23, 11))] == [
        "1.17", "1.18", "1.18", "1.23",
    ]  # fmt: skip


def test_a_file_newer_than_the_target(folder: Path, file: Path, tmp_path: Path) -> None:
    proto = onnx.load(file)
    proto.ir_version = 11
    onnx.save(proto, tmp_path / "new.onnx")
    with pytest.raises(
        ConfigError, match=r"onnxruntime 1.18 loads opset 21 and IR 10 at most, not 20 and 11"
    ):
        pn_compiler.export_model_repository(tmp_path / "new.onnx", folder, "net", target_ort="1.18")
    assert not folder.exists()


def test_types_are_those_of_the_file(folder: Path, tmp_path: Path) -> None:
    """Complaint 7: float16 in the model, FP32 in the configuration."""
    half = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 2])
    index = helper.make_tensor_value_info("i", TensorProto.INT64, ["batch", 1])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", 1])
    node = helper.make_node("GatherElements", ["x", "i"], ["y"], axis=1)
    graph = helper.make_graph([node], "g", [half, index], [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "half.onnx")
    with pytest.raises(ConfigError, match=r"input x \['batch', 2\] float16: give example_inputs"):
        pn_compiler.export_model_repository(tmp_path / "half.onnx", folder, "half")
    inputs = (torch.randn(2, 2).half(), torch.randint(0, 2, (2, 1)))
    pn_compiler.export_model_repository(tmp_path / "half.onnx", folder, "half", inputs)
    config = config_of(folder, "half")
    assert [v.data_type for v in (*config.input, *config.output)] == [
        model_config_pb2.TYPE_FP16, model_config_pb2.TYPE_INT64, model_config_pb2.TYPE_FP16,
    ]  # fmt: skip


def test_half_precision_is_float32_to_clients(folder: Path) -> None:
    """Complaint 7, for our own files: float16 stays inside."""
    report = pn_compiler.export_model_repository(network(), folder, "net", IMAGES, dtype="float16")
    config = config_of(folder)
    assert {v.data_type for v in (*config.input, *config.output)} == {model_config_pb2.TYPE_FP32}
    weights = onnx.load(report.path).graph.initializer
    assert TensorProto.FLOAT16 in {tensor.data_type for tensor in weights}
    assert Golden.load(folder / "net/1/golden.npz").tolerance == report.tolerance


def test_weights_beside_a_file_that_is_compiled(folder: Path) -> None:
    wide = nn.Conv2d(3, 64, 3).eval()  # small tensors stay in the file
    report = pn_compiler.export_model_repository(wide, folder, "net", IMAGES, external_data=True)
    assert report.path == str(folder / "net/1/model.onnx/model.onnx")
    assert {p.name for p in (folder / "net/1/model.onnx").iterdir()} == {"model.onnx", "model.onnx.data"}


class Named(nn.Module):
    """Two inputs, one of them unused, and a parameter with a name that an output would like."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.logits, x.sum(1, keepdim=True)


def test_names_are_those_that_were_asked_for(folder: Path) -> None:
    """Complaint 8: inputs renamed or dropped."""
    inputs = (torch.randn(2, 4), torch.randn(2, 3))
    pn_compiler.export_model_repository(
        Named(), folder, "net", inputs, input_names=["image", "mask"], output_names=["logits", "sum"]
    )
    config = config_of(folder)
    assert [v.name for v in (*config.input, *config.output)] == ["image", "mask", "logits", "sum"]
    report = pn_compiler.export_model_repository(Named(), folder, "default", inputs)
    assert [v["name"] for v in report.inputs] == ["x", "unused"]
    assert [v["name"] for v in report.outputs] == ["output_0", "output_1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../net"}, "name '../net': expected letters, digits"),
        ({"name": ""}, "name '': expected"),
        ({"max_batch_size": 0}, "max_batch_size=0: expected a positive integer"),
        ({"directory": "nowhere/repository"}, "there is no folder"),
        ({"directory": "file"}, "it is no folder"),
        ({"directory": "triton"}, "hides the package triton from torch"),
        ({"output_names": ["a", "b"]}, "2 output names for 1 outputs: "),
        ({"input_names": ["a"], "output_names": ["a"]}, "a is there twice"),
        ({"input_names": [""]}, "one is empty"),
    ],
)
def test_impossible_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "file").touch()
    options = {"name": "net", "directory": "model_repository"} | options
    options["directory"] = tmp_path / options["directory"]
    with pytest.raises(PnCompilerError, match=message):
        pn_compiler.export_model_repository(network(), example_inputs=IMAGES, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is damaged, or no ONNX file"),
        (lambda data: b"", "is damaged, or no ONNX file"),
        (lambda data: b"not a model", "is damaged, or no ONNX file"),
        (None, r"cannot read .*: No such file or directory"),
    ],
)
def test_a_damaged_file(folder: Path, file: Path, tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "damaged.onnx"
    if damage is not None:
        path.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ExportError, match=message):
        pn_compiler.export_model_repository(path, folder, "net")
    assert not folder.exists()


def test_an_exported_file_keeps_what_it_has(folder: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match="is exported already"):
        pn_compiler.export_model_repository(file, folder, "net", input_names=["image"])
    report = pn_compiler.export_model_repository(file, folder, "net", IMAGES, target_ort="1.17")
    told = json.loads((Path(report.repository) / "report.json").read_text())
    assert told["made"]["golden_outputs"] == "onnxruntime"


@pytest.mark.parametrize(
    "option",
    [
        {"dtype": "float16"}, {"dtype": "bfloat16"}, {"verify": False}, {"external_data": True},
        {"opset_version": 20}, {"dynamic_batch": False}, {"input_names": ["x"]}, {"output_names": ["y"]},
    ],
)  # fmt: skip
def test_options_of_the_export_are_refused_for_a_file(
    file: Path, folder: Path, option: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"exported already.*{next(iter(option))}"):
        pn_compiler.export_model_repository(file, folder, "net", IMAGES, **option)
    assert not folder.exists()


@pytest.mark.parametrize("model", [None, nn.Linear, {"weight": IMAGES}])
def test_what_is_neither_module_nor_file_is_refused(folder: Path, model: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected a torch\.nn\.Module"):
        pn_compiler.export_model_repository(model, folder, "net", IMAGES)
