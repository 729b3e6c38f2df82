"""Programs that need no second trace: the same file as by the long way, which everything else takes."""

from collections.abc import Callable
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from pn_compiler.export.programs import PlainProgram

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Formula(nn.Module):
    """A convolution, and `formula` of its result y and itself."""

    def __init__(self, formula: Callable[..., Any]) -> None:
        super().__init__()
        self.formula = formula
        torch.manual_seed(1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(1, 4)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.formula(self.conv(x), self)


def program(formula: Callable[..., Any], *, dynamic: bool = True) -> ExportedProgram:
    model = Formula(formula).eval()
    shapes = {"x": {0: torch.export.Dim("batch", min=1)}} if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (X,), dynamic_shapes=shapes, strict=False)


def as_onnx(given: ExportedProgram) -> onnx_ir.Model:
    with torch.no_grad():
        exported = torch.onnx.export(given, dynamo=True, opset_version=20, verbose=False)
    assert exported is not None
    return exported.model


def content(model: onnx_ir.Model) -> list[Any]:
    """Operators with attributes and shapes of results, and the values of constants: all but names."""
    operators = [
        (
            node.op_type,
            sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()),
            [
                [size if isinstance(size, int) else "batch" for size in out.shape or ()]
                for out in node.outputs
            ],
            [value.const_value.numpy().tolist() for value in node.inputs if value and value.const_value],
        )
        for node in model.graph
    ]
    return [operators, len(model.graph.initializers)]


def read_again(y: Tensor, m: Formula) -> Tensor:
    y = m.norm(y)
    y.mul_(m.scale)
    return y + m.conv(y)


def of_what_is_contiguous_already(y: Tensor, m: Formula) -> Tensor:
    y.contiguous().relu_()
    return y + 1


PLAIN: dict[str, Callable[..., Any]] = {
    "in-place activation": lambda y, m: m.conv(F.relu_(y)),
    "in-place sum": lambda y, m: F.silu(y.mul(2).add_(m.norm(y))),
    "written through an alias": of_what_is_contiguous_already,
    "written value read again": read_again,
    "hardswish in place": lambda y, m: F.hardswish(m.norm(y), inplace=True) + y,
    "squeeze and excitation": lambda y, m: y * F.hardsigmoid(m.conv(F.adaptive_avg_pool2d(y, 1))),
    "flatten": lambda y, m: F.adaptive_avg_pool2d(y, (1, 1)).flatten(1) * 2,
    "dropout": lambda y, m: m.conv(F.dropout(y, 0.5, m.training)),
    "dropout in place": lambda y, m: m.conv(F.dropout(F.relu(y), 0.5, m.training, inplace=True)),
    "shuffle": lambda y, m: torch.cat(
        y.view(-1, 2, 2, 6, 6).transpose(1, 2).contiguous().view(-1, 4, 6, 6).chunk(2, dim=1)[::-1], 1
    ),
    "chunks of unequal length": lambda y, m: torch.cat([*reversed(y.chunk(3, 3))], 3),
    "padding": lambda y, m: F.max_pool2d(F.pad(y, (0, 1, 0, 1)), 2) + F.max_pool2d(
        F.pad(y, (1, 0, 1, 0), value=-9.0), 2
    ),
    "cast without effect": lambda y, m: y.to(torch.float32) * m.scale.to(y.dtype),
    "reshape": lambda y, m: y.reshape(y.shape[0], 1, -1).mean(2, keepdim=True).rsqrt() + y.reshape(-1, 4, 36),
}  # fmt: skip


@pytest.mark.parametrize("formula", PLAIN.values(), ids=PLAIN)
def test_plain_programs_are_not_traced_again(
    formula: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(as_onnx(program(formula)))
    plain = PlainProgram.of(program(formula))
    monkeypatch.delattr(ExportedProgram, "run_decompositions")
    assert content(as_onnx(plain)) == expected


def test_plain_with_a_fixed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    formula = PLAIN["flatten"]
    expected = content(as_onnx(program(formula, dynamic=False)))
    plain = PlainProgram.of(program(formula, dynamic=False))
    monkeypatch.delattr(ExportedProgram, "run_decompositions")
    assert content(as_onnx(plain)) == expected


def through_a_view(y: Tensor, m: Formula) -> Tensor:
    flat = y.view(-1, 144)
    y.relu_()
    return flat * 2


def of_a_part(y: Tensor, m: Formula) -> Tensor:
    y[:, :2].relu_()
    return y + 1


def of_a_copy(y: Tensor, m: Formula) -> tuple[Tensor, Tensor]:
    y.transpose(2, 3).contiguous().relu_()
    z = y.transpose(2, 3).reshape(-1, 144)
    return y + 1, z.add_(1.0)


LONG: dict[str, Callable[..., Any]] = {
    "written through a view": through_a_view,
    "written through a slice": of_a_part,
    "a copy is written": of_a_copy,
    "another operator": lambda y, m: F.adaptive_avg_pool2d(y, 3) + F.instance_norm(y)[..., :3, :3],
    "output of no effect": lambda y, m: F.dropout(y, 0.5, False),
    "cast": lambda y, m: y.to(torch.float64).add_(1.0).to(torch.float32),
    "flatten of everything": lambda y, m: (y.flatten() * 2, y.flatten(1, 2)),
}


@pytest.mark.parametrize("formula", LONG.values(), ids=LONG)
def test_others_are(formula: Callable[..., Any]) -> None:
    expected = Formula(formula).eval()(X)
    plain = PlainProgram.of(program(formula))
    taken = []
    traced = plain.run_decompositions
    plain.run_decompositions = lambda table: taken.append(traced(table)) or taken[0]  # type: ignore[method-assign, func-returns-value]
    model = onnx_ir.to_proto(as_onnx(plain)).SerializeToString()
    assert taken[0] is not plain
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    actual = session.run(None, {"x": X.numpy()})
    for a, e in zip(actual, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), e, rtol=1e-4, atol=1e-5)
