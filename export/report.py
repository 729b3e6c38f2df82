"""The report of a compilation: text for people, JSON for machines."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import onnx

from pn_compiler.base.diagnostics import Diagnostic, Site
from pn_compiler.base.strict_json import to_json
from pn_compiler.base.tables import size
from pn_compiler.export.summary import details, summary
from pn_compiler.graph.pass_log import PassRun


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One comparison of the ONNX file with the PyTorch model.

    Attributes:
        batch: batch size.
        optimized: whether onnxruntime's graph optimizations were on.
        output: name of the worst output.
        error: largest absolute difference of that output, relative to its largest magnitude.
        sizes: of the axes that may have any, such as "H=64, W=96"; empty for those of the example.
    """

    batch: int
    optimized: bool
    output: str
    error: float
    sizes: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Benchmark:
    """A file beside that of the same network with BatchNorm, in onnxruntime on this machine.

    Attributes:
        milliseconds: of an inference, by file: "BatchNorm" and "converted"; medians over sessions in turn.
        ratio: of the two, the median over pairs of sessions.
        batch: samples in an inference.
        threads: of onnxruntime.
        file_bytes: size of the file with BatchNorm.
        operators: how often each stands in that file, as torch.onnx writes it.
    """

    milliseconds: dict[str, float]
    ratio: float
    batch: int
    threads: int
    file_bytes: int
    operators: dict[str, int]

    def __str__(self) -> str:
        before, after = self.milliseconds["BatchNorm"], self.milliseconds["converted"]
        return (
            f"{self.ratio:.2f} times the time of the same network with BatchNorm: {after:.2f} ms, not "
            f"{before:.2f} ms (onnxruntime, batch {self.batch}, {self.threads} threads); its file has "
            f"{size(self.file_bytes)}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Result of `pn_compiler.export_onnx` and `pn_compiler.compile`; ``str`` of it is for people.

    Attributes:
        path: the ONNX file.
        opset_version, ir_version: of that file.
        inputs, outputs: name, shape and element type of each; a dynamic axis has a name.
        input_shape_source: where the input shape came from.
        sites: one record per BatchNorm of the input model; empty if it was not converted here.
        notes: diagnostics of the conversion.
        parameters_before, parameters_after: number of trained values, before conversion and in the file.
        operators_before, operators_after: operators of the traced input model and of the ONNX file.
        checks: the comparisons that were made; empty with ``verify=False``.
        tolerance: the largest relative error that was accepted.
        float32_error: relative error of PyTorch's own result in `dtype`, for comparison.
        dtype: dtype of weights and activations.
        runtime: the runtime that the file was run in.
        reference: dtype of the PyTorch model that the file was compared with.
        target: the runtime that the file was written for; see docs/latency.md.
        blocked: how many normalizers are in onnxruntime's blocked layout, for target "ort-cpu".
        tuning: milliseconds per inference by candidate, as measured for target "auto" now or earlier.
        norms: how the normalizers were lowered, if differently from the target's default.
        distillation: the report of `pn_compiler.distill`; None if there was none.
        static: the report of `pn_compiler.freeze_statistics`; None if there was none.
        fidelity: distance of the outputs from the original model's; None if it was converted before.
        benchmark: speed, size and operators of the file beside those of the same network with BatchNorm; None
            if that was not measured.
        file_bytes, data_bytes: size of the ONNX file, and of the separate file with the weights, if any.
        repository: the version folder that was written for servers.
        batching: how a server may batch requests, in words.
        seconds: duration of each stage.
        passes: what each pass did, over all graphs of the model, in order.
        versions: versions of the packages involved.
    """

    path: str = ""
    opset_version: int = 0
    ir_version: int = 0
    inputs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    outputs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    input_shape_source: str = "given"
    sites: tuple[Site, ...] = ()
    notes: tuple[Diagnostic, ...] = ()
    parameters_before: int = 0
    parameters_after: int = 0
    operators_before: dict[str, int] = dataclasses.field(default_factory=dict)
    operators_after: dict[str, int] = dataclasses.field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    tolerance: float | None = None
    float32_error: float | None = None
    dtype: str = "float32"
    runtime: str = "onnxruntime"
    reference: str | None = None
    target: str = "portable"
    blocked: int = 0
    tuning: dict[str, float] = dataclasses.field(default_factory=dict)
    norms: str = ""
    distillation: Any = None
    static: Any = None
    fidelity: Any = None
    benchmark: Benchmark | None = None
    file_bytes: int = 0
    data_bytes: int = 0
    repository: str = ""
    batching: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    passes: tuple[PassRun, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def max_error(self) -> float | None:
        """Largest relative error over all checks; None if nothing was verified."""
        return max((check.error for check in self.checks), default=None)

    def to_json(self) -> str:
        content = dataclasses.asdict(self) | {"max_error": self.max_error}
        return to_json(content)

    @property
    def summary(self) -> str:
        """What was done, what it cost, and what to do next, in some ten lines."""
        return "\n".join(map(str, summary(self)))

    def __str__(self) -> str:
        return f"{details(self)}\n\n{self.summary}"


def count_onnx_operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator stands in `model`, those in the bodies of others included."""
    return dict(sorted(collections.Counter(_operators(model.graph)).items()))


def _operators(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _operators(inner)


def describe_values(values: Any) -> list[dict[str, Any]]:
    """Name, shape and element type of the inputs or outputs of an ONNX graph."""
    return [
        {
            "name": value.name,
            "shape": [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            "dtype": onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower(),
        }
        for value in values
    ]
