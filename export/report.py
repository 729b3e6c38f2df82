"""The report of a compilation: text for people, JSON for machines."""

import collections
import dataclasses
from typing import Any

import onnx

from pn_compiler.base.diagnostics import Diagnostic, Site, format_sites, format_table
from pn_compiler.base.strict_json import to_json


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
class Report:
    """Result of `pn_compiler.export_onnx` and `pn_compiler.compile`.

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
        file_bytes, data_bytes: size of the ONNX file, and of the separate file with the weights, if any.
        repository: the version folder that was written for servers.
        batching: how a server may batch requests, in words.
        seconds: duration of each stage.
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
    file_bytes: int = 0
    data_bytes: int = 0
    repository: str = ""
    batching: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def max_error(self) -> float | None:
        """Largest relative error over all checks; None if nothing was verified."""
        return max((check.error for check in self.checks), default=None)

    def to_json(self) -> str:
        content = dataclasses.asdict(self) | {"max_error": self.max_error}
        return to_json(content)

    def __str__(self) -> str:
        lines = [format_sites(self.sites), ""] if self.sites else []
        said = [note for note in self.notes if note.code != "PN212"]  # it comes at the end
        lines += [str(note) for note in said if note.severity == "warning" or not note.site]
        names = sorted({*self.operators_before, *self.operators_after})
        rows = [
            (n, str(self.operators_before.get(n, "")), str(self.operators_after.get(n, ""))) for n in names
        ]
        lines += [format_table(("operator", "before", "after"), rows), ""]
        lines.append(f"parameters  {self.parameters_before:,} -> {self.parameters_after:,}")
        for label, values in (("input", self.inputs), ("output", self.outputs)):
            lines += [f"{label:<11} {v['name']} {v['shape']} {v['dtype']}" for v in values]
        if self.input_shape_source != "given":
            lines.append(f"input shape {self.input_shape_source}")
        if self.distillation is not None:
            lines += [f"distilled   {line}" for line in str(self.distillation).splitlines()]
        if self.static is not None:
            lines += ["", *str(self.static).splitlines(), ""]
        lines += self._target()
        if self.norms:
            lines.append(f"norms       {self.norms}")
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        lines.append(f"seconds     {stages}")
        data = f" and {self.data_bytes / 1e6:.2f} MB in {self.path}.data" if self.data_bytes else ""
        lines.append(
            f"wrote       {self.path} ({self.file_bytes / 1e6:.2f} MB{data}, opset {self.opset_version}, "
            f"IR {self.ir_version})"
        )
        if self.repository:
            lines.append(f"repository  {self.repository} ({self.batching})")
        if self.fidelity is not None:
            lines.append(f"conversion  {self.fidelity}")
        lines.append(self._verdict())
        if self.fidelity is not None:
            lines.append(f"next        {self.fidelity.advice}")
        return "\n".join(lines)

    def _target(self) -> list[str]:
        """The lines about the target; none for a portable file that was not chosen among others."""
        lines = [f"target      {self.target}"] if self.target != "portable" or self.tuning else []
        if self.blocked:
            lines.append(
                f"            {self.blocked} normalizers in the blocked layout: for onnxruntime "
                f"{self.versions.get('onnxruntime', '')} on CPUs of this kind only; others refuse the file"
            )
        if self.tuning:
            times = sorted(self.tuning.items(), key=lambda item: item[1])
            lines.append("measured    " + ", ".join(f"{name} {time:.2f} ms" for name, time in times))
        return lines

    def _verdict(self) -> str:
        if not self.checks:
            return "verified    no"
        batches = sorted({check.batch for check in self.checks})
        others = sorted({check.sizes for check in self.checks} - {""})
        return (
            f"verified    largest error {self.max_error:.1e} (relative, limit {self.tolerance:.1e}) to "
            f"{self.reference} PyTorch at batch {' and '.join(map(str, batches))}"
            f"{''.join(f', and at {sizes}' for sizes in others)}; "
            f"PyTorch's own in {self.dtype}: {self.float32_error:.1e}"
            + ("" if self.runtime == "onnxruntime" else f"; run in {self.runtime}, for onnxruntime cannot")
        )


def count_onnx_operators(model: onnx.ModelProto) -> dict[str, int]:
    return dict(sorted(collections.Counter(node.op_type for node in model.graph.node).items()))


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
