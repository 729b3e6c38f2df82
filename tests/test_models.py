"""What is taken as a model, and what one clear error says of the rest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pn_compiler
from pn_compiler.errors import ConfigError, PnCompilerError, TraceError, VerificationError
from pn_compiler.integrations.opacus import prepare
from pn_compiler.testing import count_modules, randomize_batch_norms

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return randomize_batch_norms(net).eval()  # type: ignore[return-value]


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "transform": pn_compiler.transform,
    "transform strict": lambda model: pn_compiler.transform(model, IMAGES, strict=True),
    "compile": lambda model: pn_compiler.compile(model, "never.onnx", IMAGES),
    "fold": pn_compiler.fold,
    "export_onnx": lambda model: pn_compiler.export_onnx(model, "never.onnx", IMAGES),
    "diagnose": lambda model: pn_compiler.diagnose(model, [IMAGES]),
    "distill": lambda model: pn_compiler.distill(model, network(), [IMAGES]),
    "distill from": lambda model: pn_compiler.distill(pn_compiler.transform(network()), model, [IMAGES]),
    "freeze_statistics": lambda model: pn_compiler.freeze_statistics(model, [IMAGES]),
    "convert_state_dict": lambda model: pn_compiler.convert_state_dict({}, model),
    "param_groups": lambda model: pn_compiler.param_groups(model, 0.1),
    "sites": pn_compiler.sites,
    "notes": pn_compiler.notes,
    "prepare": prepare,
}
NO_MODELS = {
    "name": "resnet18", "path": Path("model.pt"), "none": None, "class": nn.Conv2d, "function": network,
    "state_dict": {"weight": IMAGES}, "tensor": IMAGES, "list": [nn.ReLU()],
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("model", NO_MODELS)
def test_what_is_no_module_is_one_clear_error(function: str, model: str) -> None:
    with pytest.raises(ConfigError, match=r"^expected a torch\.nn\.Module, got .*: ") as caught:
        FUNCTIONS[function](NO_MODELS[model])
    assert "\n" not in str(caught.value)


def test_an_exported_program_is_told_to_give_its_module() -> None:
    program = torch.export.export(network(), (IMAGES,))
    with pytest.raises(ConfigError, match=r"program\.module\(\)"):
        pn_compiler.transform(program)  # type: ignore[arg-type]
    assert count_modules(pn_compiler.transform(program.module()), nn.BatchNorm2d) == 0


class Asserts(nn.Module):
    """As a bare assert does: pytest gives those in tests a message."""

    def __init__(self, limit: float = 1.0) -> None:
        super().__init__()
        self.body, self.limit = network(), limit

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] >= self.limit:
            raise AssertionError
        return self.body(x)


def test_a_bare_assert_in_a_forward_is_named(tmp_path: Path) -> None:
    with pytest.raises(PnCompilerError, match="AssertionError"):
        pn_compiler.compile(Asserts(), tmp_path / "m.onnx", IMAGES)
    with pytest.raises(VerificationError, match="batch 3: AssertionError"):
        pn_compiler.export_onnx(Asserts(limit=3), tmp_path / "m.onnx", IMAGES)
    with pytest.raises(ConfigError, match="AssertionError"):
        pn_compiler.diagnose(Asserts(), [IMAGES])

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    with pytest.raises(TraceError, match="ValueError"):
        pn_compiler.fold(Fails())
