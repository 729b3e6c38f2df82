"""Models on the meta device or of fake tensors: their structure is converted; what needs values says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pn_compiler
from pn_compiler.base.errors import ConfigError

MODE = FakeTensorMode()


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def example() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def fake(make: Callable[[], Any], mode: FakeTensorMode = MODE) -> Any:
    with mode:
        return make()


MODELS: dict[str, Callable[[], nn.Module]] = {"fake": lambda: fake(net), "meta": lambda: net().to("meta")}
EXAMPLES: dict[str, Callable[[], Tensor | None]] = {
    "real": example,
    "fake": lambda: fake(example),
    "fake in another mode": lambda: fake(example, FakeTensorMode()),
    "meta": lambda: example().to("meta"),
    "none": lambda: None,
}


@pytest.mark.parametrize("inputs", EXAMPLES)
@pytest.mark.parametrize("model", MODELS)
def test_the_structure_is_converted(model: str, inputs: str) -> None:
    converted = pn_compiler.transform(MODELS[model](), EXAMPLES[inputs]())
    assert [site.kind for site in pn_compiler.sites(converted)] == ["pn"]
    assert "PN211" in {note.code for note in pn_compiler.notes(converted)}
    assert type(next(converted.parameters()).data) is type(next(MODELS[model]().parameters()).data)
    pn_compiler.fold(converted)


NEED_VALUES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "calibrate": lambda m, path: pn_compiler.transform(m, warm_start="calibrate", calibration=[example()]),
    "compile": lambda m, path: pn_compiler.compile(m, path, example()),
    "export": lambda m, path: pn_compiler.export_onnx(pn_compiler.transform(m), path, example()),
    "diagnose": lambda m, path: pn_compiler.diagnose(m, [example()]),
    "distill": lambda m, path: pn_compiler.distill(pn_compiler.transform(m), m, [example()], steps=1),
    "freeze": lambda m, path: pn_compiler.freeze_statistics(pn_compiler.transform(m), [example()]),
}


@pytest.mark.parametrize("use", NEED_VALUES)
@pytest.mark.parametrize("model", MODELS)
def test_what_needs_values_says_so(model: str, use: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no values") as caught:
        NEED_VALUES[use](MODELS[model](), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
