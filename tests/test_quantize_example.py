"""examples/quantize_digits.py on networks trained for a moment: what becomes int8, and what does not."""

import re
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch

import pn_compiler
from benchmarks import int8
from examples import quantization as recipe
from pn_compiler.export.report import count_onnx_operators
from pn_compiler.testing import randomize_batch_norms

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)  # as when it is run as a script
    import quantize_digits

    return quantize_digits


@pytest.fixture
def folder(example, tmp_path) -> Path:
    """What `make demo` leaves, after two epochs."""
    import digits

    torch.manual_seed(0)
    images, labels, _, _ = digits.load_data()
    model = digits.DigitsNet()
    digits.train(model, images, labels, epochs=2, lr=3e-3)
    digits.export_plainly(model, tmp_path / "batch_norm.onnx", images[:1])
    pn_compiler.export_onnx(pn_compiler.transform(model), tmp_path / "model.onnx", images[:1])
    (tmp_path / "tuned.onnx").write_bytes((tmp_path / "model.onnx").read_bytes())
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of onnx, in onnxruntime.quantization
def test_int8_keeps_accuracy_and_normalizers(example, folder, capsys) -> None:
    example.main(["--folder", str(folder), "--rounds", "1"])
    printed = capsys.readouterr().out
    rows = re.findall(r"^(.+?) +([\d.]+) % +(\d+) kB +([\d.]+) +([\d.]+) %$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == [
        f"{network}, {dtype}"
        for network in ("BatchNorm", "compiled", "compiled, tuned")
        for dtype in ("float32", "int8")
    ]
    for exact, quantized in zip(rows[::2], rows[1::2], strict=True):
        assert abs(float(exact[1]) - float(quantized[1])) <= 2
        assert int(quantized[2]) < 0.5 * int(exact[2])
        assert float(exact[4]) == 0 < float(quantized[4]) < 10
    runs = example.operators(folder / "model.int8.onnx")
    expected = {"QLinearConv": 15, "QGemm": 1, "Pow": 15, "Conv": 15}
    assert {name: runs[name] for name in expected} == expected
    onnx.checker.check_model(folder / "model.int8.onnx", full_check=True)


def test_a_depthwise_1x1_convolution_is_an_affine() -> None:
    def graph(groups: int, kernel: int) -> onnx.GraphProto:
        weight = onnx.numpy_helper.from_array(torch.ones(4, 4 // groups, kernel, kernel).numpy(), "w")
        node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], group=groups)
        return onnx.helper.make_graph([node], "g", [], [], [weight])

    found = {case: recipe.is_affine(graph(*case).node[0], graph(*case)) for case in ((4, 1), (4, 3), (1, 1))}
    assert found == {(4, 1): True, (4, 3): False, (1, 1): False}


def test_without_the_demo_it_says_what_to_run(example, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        example.main(["--folder", str(tmp_path)])
    assert "run make demo first" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_benchmark_quantizes_each_kind_of_file(tmp_path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 5),
    )  # fmt: skip
    images = torch.randn(16, 3, 8, 8)
    given = int8.Task(randomize_batch_norms(net).eval(), images, images, None)
    paths = int8.files(tmp_path, given)
    assert list(paths) == [
        f"{name}, {dtype}" for name in ("BatchNorm", "default", int8.STATIC) for dtype in ("float32", "int8")
    ]
    quantized = {name: count_onnx_operators(onnx.load(path)) for name, path in paths.items()}
    assert all(("QuantizeLinear" in counts) == name.endswith("int8") for name, counts in quantized.items())
    assert quantized["BatchNorm, int8"] == quantized[f"{int8.STATIC}, int8"]
    expected = int8.classes(paths["BatchNorm, float32"], images)
    with torch.no_grad():
        assert (expected == given.network(images).argmax(1)).all()
    assert (int8.classes(paths["BatchNorm, int8"], images) == expected).double().mean() >= 0.9
