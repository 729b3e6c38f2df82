"""The runtimes that a file can be written for, and how the files differ."""

import dataclasses
from typing import Literal

import onnx_ir

from pn_compiler.base.config import ExportConfig
from pn_compiler.base.errors import ConfigError
from pn_compiler.export.rewrites.depthwise_affine import use_depthwise_affines
from pn_compiler.export.rewrites.normalizers import expand_group_norms, pool_squares, use_two_stage_sums
from pn_compiler.export.rewrites.prelu import expand_prelus, use_leaky_relus
from pn_compiler.export.rewrites.reductions import use_reductions
from pn_compiler.export.rewrites.simplify import drop_plain_affines


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """How normalizers are written.

    Attributes:
        name: name of the target, and of the variant if there are several.
        norms: InstanceNormalization, means in two stages, or, where there is one group, reductions over axes.
            No target gets GroupNormalization: see `TARGETS`.
        affines: weight, bias and per-channel slopes as depthwise 1x1 Conv, or as Mul, Add and PRelu.
        blocked: whether the graph is laid out for onnxruntime on this kind of CPU: see `in_blocked_layout`.
    """

    name: str
    norms: Literal["instance", "two-stage", "reductions"] = "instance"
    affines: Literal["conv", "elementwise"] = "conv"
    blocked: bool = False

    def lower(self, model: onnx_ir.Model) -> None:
        """Rewrites the normalizers and PRelu in torch.onnx's output for this target, not yet the layout."""
        use_leaky_relus(model)
        expand_group_norms(model)
        drop_plain_affines(model)
        if self.norms == "two-stage":
            use_two_stage_sums(model)
        if self.norms == "reductions":
            use_reductions(model)
        if self.affines == "conv":
            use_depthwise_affines(model)
            expand_prelus(model)
            if not self.blocked:  # which brings all of a normalizer into the layout of convolutions
                pool_squares(model)


PORTABLE = Target("portable")
ORT_CPU = Target("ort-cpu", blocked=True)
# GroupNormalization is for none of them. onnxruntime has no CPU kernel for it. TensorRT 10.7 does not parse
# that of opset 21 (NVIDIA/TensorRT, issue 4336), and 10.16 computes one group as one per channel, in silence
# (issue 4756). OpenVINO 2026.4 crashes, in float32 with a fixed batch above 1, on two residual sums of it.
TARGETS = {
    "portable": PORTABLE,
    "ort-cpu": ORT_CPU,
    "openvino": Target("openvino", norms="reductions", affines="elementwise"),  # which its passes fuse
    "cuda": Target("cuda", affines="elementwise"),  # a depthwise Conv would be a separate kernel
    "tensorrt": Target("tensorrt", affines="elementwise"),  # as torch.onnx has always exported GroupNorm
}
#: what `tune` measures; sums in two stages can share several threads
CANDIDATES = (
    PORTABLE,
    Target("portable, two-stage sums", norms="two-stage"),
    Target("portable, Mul and Add", affines="elementwise"),
    ORT_CPU,
    Target("ort-cpu, two-stage sums", norms="two-stage", blocked=True),
)


def check_target(options: ExportConfig) -> None:
    """Raises ConfigError if the target of `options` does not support the others."""
    name = options.target
    if options.tune and name != "auto":
        raise ConfigError(f"tuning chooses a target, and {name} is given: use target auto")
    if name == "auto":
        return
    target = TARGETS[name]
    if target.blocked and options.dtype != "float32":
        raise ConfigError(f"target {name} is for float32: onnxruntime has no such layout for {options.dtype}")
    if target.blocked and options.external_data:
        raise ConfigError(f"target {name} writes one file: leave out external data")
