"""A folded normalizer is one operator for torch.onnx, and the same operators as before in the file."""

import contextlib
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pn_compiler.export import exporter
from pn_compiler.export.exporter import export_graph
from pn_compiler.export.folded_norms import as_one_operator
from pn_compiler.export.options import ExportOptions
from pn_compiler.nn import FoldedNorm
from pn_compiler.running.inputs import Inputs

CHANNELS = 8


class Site(nn.Module):
    """A normalizer and an activation."""

    def __init__(self, groups: int = 1, *, centered: bool = True, share: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight, bias, shift = torch.randn(3, CHANNELS, generator=generator)
        self.norm = FoldedNorm(
            groups, CHANNELS, centered=centered,
            share=torch.rand(groups, generator=generator) if share else None,
            var=torch.rand(groups, generator=generator), shift=None if centered else shift,
            weight=weight, bias=bias,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def exported(model: nn.Module, x: Tensor, **options: Any) -> onnx_ir.Model:
    return export_graph(model.eval(), Inputs((x,)), ExportOptions(**options), None)


def content(model: onnx_ir.Model) -> list[Any]:
    """Operators with attributes, types and shapes of results, and the values of constants: all but names."""
    constants = [
        [value.const_value.numpy().tolist() for value in node.inputs if value and value.const_value]
        for node in model.graph
    ]
    results = [
        [(value.dtype, str(value.shape)) for value in node.outputs] + sorted(map(str, node.attributes))
        for node in model.graph
    ]
    operators = [(node.domain, node.op_type) for node in model.graph]
    return [operators, results, constants, len(model.graph.initializers), dict(model.opset_imports)]


def outputs(model: onnx_ir.Model, x: Tensor) -> np.ndarray:
    file = onnx_ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return y


@pytest.mark.parametrize(
    ("site", "shape", "options"),
    [
        (Site(), (2, CHANNELS, 5, 4), {}),
        (Site(2), (2, CHANNELS, 5, 4), {"dynamic_batch": False}),
        (Site(2, centered=False), (2, CHANNELS, 5), {}),
        (Site(centered=False, share=False), (2, CHANNELS), {"opset_version": 23}),
    ],
)
def test_the_file_is_the_same(
    site: nn.Module, shape: tuple[int, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape)
    actual = content(exported(site, x, **options))
    monkeypatch.setattr(exporter, "as_one_operator", lambda model: contextlib.nullcontext())
    assert actual == content(exported(site, x, **options))


@pytest.mark.parametrize("axes", [("W",), ("H", "W")])
def test_sizes_may_be_unknown(axes: tuple[str, ...]) -> None:
    site = Site(2)
    model = exported(site, torch.randn(2, CHANNELS, 16, 24), dynamic_axes=axes)
    x = torch.randn(3, CHANNELS, 16, 10) * 2 + 1
    np.testing.assert_allclose(outputs(model, x), site(x).detach(), rtol=1e-5, atol=1e-5)


def test_weights_may_be_computed() -> None:
    site, x = Site(), torch.randn(2, CHANNELS, 3, 3)
    parametrize.register_parametrization(site.norm, "weight", Doubled())
    np.testing.assert_allclose(outputs(exported(site, x), x), site(x).detach(), rtol=1e-5, atol=1e-5)


def test_nothing_changes_for_other_calls() -> None:
    site, x = Site(), torch.randn(2, CHANNELS, 3, 3)
    expected = site(x)
    with as_one_operator(site):
        assert torch.equal(site(x), expected)
        program = torch.export.export(site, (x,), strict=False)
    assert len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim)) == 0
    program = torch.export.export(site, (x,), strict=False)
    assert len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim)) == 4
