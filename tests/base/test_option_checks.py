"""Wrong values of any option: a ConfigError of one line that names the option, before any work."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pn_compiler
from pn_compiler.base.errors import PnCompilerError
from pn_compiler.testing import randomize_batch_norms

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
STRANGE: tuple[Any, ...] = (3.5, -1, math.nan, "x\n", b"", None, object(), [], {"a": 1}, True, nn.ReLU)

Call = Callable[..., object]


class Forbidden(nn.Module):
    """Of which no work may begin."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the option was looked at too late")


def bad_flags(*names: str) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name in names for value in STRANGE if value is not True)


def bad_numbers(*names: str, none: bool = False) -> Iterator[tuple[str, Any]]:
    usable = (3.5, *((None,) if none else ()))
    return ((name, value) for name in names for value in STRANGE if value not in usable)


def bad_functions(*names: str) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name in names for value in STRANGE if value is not None)


def bad_names(*names: str) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name in names for value in STRANGE if value != "x\n")


CHOICES = [(name, v) for name in ("proxy_padding", "warm_start") for v in STRANGE]
CHOICES += [("norm", v) for v in STRANGE if v is not None]
GROUPS = [("num_groups", v) for v in (*STRANGE, 0) if v is not None]
LEAVES = [("leaves", v) for v in (3.5, -1, object(), b"a", [3], [None], [int], math.nan, True)]
EXPORT = [
    *bad_flags("dynamic_batch", "external_data", "verify", "tune"), *bad_functions("progress"),
    *((n, v) for n in ("target", "dtype") for v in STRANGE),
    *((n, v) for n in ("opset_version", "target_ort") for v in STRANGE if v is not None),
    *((n, v) for n in ("input_names", "output_names") for v in (*STRANGE, [3], [""]) if v != []),
    *((n, v) for n in ("repository",) for v in STRANGE if v is not None),
]  # fmt: skip
CASES: list[tuple[Call, dict[str, Any], list[tuple[str, Any]]]] = [
    (
        pn_compiler.transform,
        {"model": Forbidden(), "example_inputs": X},
        [*CHOICES, *GROUPS, *LEAVES, *bad_flags("proxy", "strict", "norm_only_bias")],
    ),
    (
        pn_compiler.compile,
        {"model": Forbidden(), "path": "never.onnx", "example_inputs": X},
        [
            *CHOICES, *GROUPS, *LEAVES, *EXPORT, *bad_flags("proxy", "strict"),
            *bad_names("path"), *bad_numbers("error_budget"),
            *bad_numbers("distill_steps"), ("distill_steps", 3.5),
            *(("static_statistics", v) for v in STRANGE if v is not None),
            *(("distill_logits", v) for v in STRANGE),
        ],
    ),
    (
        pn_compiler.export_onnx,
        {"model": Forbidden(), "path": "never.onnx", "example_inputs": X},
        [*EXPORT, *bad_names("path")],
    ),
    (pn_compiler.fold, {"model": Forbidden()}, [*bad_functions("progress")]),
    (
        pn_compiler.distill,
        {"model": Forbidden(), "teacher": Forbidden(), "batches": [X]},
        [
            *bad_numbers("steps", "batch_size", "max_samples", "lr", "held_out"),
            *((n, v) for n in ("steps", "batch_size", "max_samples", "seed") for v in (3.5, "1", None)),
            *(("logits", v) for v in STRANGE), *bad_functions("loss"),
            *((n, v) for n, v in bad_names("checkpoint") if v is not None),
        ],
    ),
    (
        pn_compiler.freeze_statistics,
        {"model": Forbidden(), "calibration": [X]},
        [*bad_numbers("budget", none=True), *bad_numbers("held_out", "max_samples"), ("held_out", 3.5)],
    ),
    (
        pn_compiler.diagnose,
        {"model": Forbidden(), "batches": [X]},
        [*bad_flags("batch_statistics", "affine")],
    ),
    (
        pn_compiler.param_groups,
        {"model": Forbidden(), "weight_decay": 0.1},
        [
            *bad_numbers("weight_decay"), *bad_numbers("proxy_weight_decay", none=True),
            *(("no_weight_decay", v) for v in (3, "x", None, object())),
        ],
    ),
    (
        pn_compiler.proxy_moments,
        {"activation": torch.relu, "mean": X, "std": X.abs()},
        [
            *((n, v) for n in ("mean", "std", "method", "activation") for v in STRANGE),
        ],
    ),
    (
        pn_compiler.ModelRepository,
        {"directory": Path("models"), "name": "net"},
        [
            *bad_names("directory"), *bad_flags("force"), *bad_numbers("max_batch_size"),
            ("max_batch_size", 3.5), *(("name", v) for v in STRANGE),
        ],
    ),
    (pn_compiler.output_loss, {"student": X, "teacher": X}, [("logits", v) for v in STRANGE]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "arguments", "option", "value"),
    [
        pytest.param(call, arguments, option, value, id=f"{call.__name__}-{option}-{value!r:.20}")
        for call, arguments, bad in CASES
        for option, value in bad
    ],
)
def test_a_wrong_value_names_its_option(
    call: Call,
    arguments: dict[str, Any],
    option: str,
    value: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PnCompilerError) as caught:
        call(**(arguments | {option: value}))
    message = str(caught.value)
    assert option.removesuffix("_version").removesuffix("s") in message.replace("tuning", "tune")
    assert "\n" not in message
    assert len(message) < 300
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("batches", [3, "data", b"data", object(), nn.ReLU, lambda: X])
def test_what_holds_no_batches(batches: Any) -> None:
    net = randomize_batch_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    for call in (
        lambda: pn_compiler.transform(net, calibration=batches),
        lambda: pn_compiler.diagnose(net, batches),
        lambda: pn_compiler.distill(net, net, batches),
        lambda: pn_compiler.freeze_statistics(net, batches),
        lambda: pn_compiler.compile(net, "m.onnx", warm_start="calibrate", calibration=batches),
    ):
        with pytest.raises(PnCompilerError, match="expected batches of inputs"):
            call()
