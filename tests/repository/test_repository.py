"""Model repositories: what is in them, versions, and what is caught before a server sees it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper
from torch import Tensor, nn
from tritonclient.grpc import model_config_pb2

import pn_compiler
from pn_compiler.base.errors import ConfigError, ExportError, PnCompilerError
from pn_compiler.export import choose_opset, make_session, oldest_onnxruntime, relative_error
from pn_compiler.repository.golden import Golden
from pn_compiler.repository.triton_config import model_config_class
from tests.repository.common import IMAGES, config_of, content, network


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
