"""For which runtime a file is written, and what of that is different in it."""

import dataclasses
from typing import Literal

import onnx_ir

from pn_compiler.base.errors import ConfigError
from pn_compiler.export.rewrites.depthwise_affine import use_depthwise_affines
from pn_compiler.export.rewrites.normalizers import expand_group_norms, use_two_stage_sums
from pn_compiler.export.rewrites.prelu import expand_prelus, use_leaky_relus

TargetName = Literal["portable", "ort-cpu", "openvino", "cuda", "tensorrt", "auto"]
GROUP_NORM_OPSET = 21  # the first whose GroupNormalization has a weight for each channel


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """How normalizers are written.

    Attributes:
        name: of the target, and of the way if there are several.
        norms: InstanceNormalization, means in two stages, or GroupNormalization with its weight and bias.
        affines: weight, bias and slopes of channels as depthwise 1x1 Conv, or as Mul, Add and PRelu.
        blocked: whether the graph is laid out for onnxruntime on this kind of CPU: see `in_blocked_layout`.
    """

    name: str
    norms: Literal["instance", "two-stage", "group"] = "instance"
    affines: Literal["conv", "elementwise"] = "conv"
    blocked: bool = False

    @property
    def oldest_opset(self) -> int:
        return GROUP_NORM_OPSET if self.norms == "group" else 18

    def lower(self, model: onnx_ir.Model) -> None:
        """Writes normalizers and PRelu of what torch.onnx gave in this way; the layout is not changed yet."""
        use_leaky_relus(model)
        if self.norms == "group":
            return
        expand_group_norms(model)
        if self.norms == "two-stage":
            use_two_stage_sums(model)
        if self.affines == "conv":
            use_depthwise_affines(model)
            expand_prelus(model)


PORTABLE = Target("portable")
ORT_CPU = Target("ort-cpu", blocked=True)
TARGETS = {
    "portable": PORTABLE,
    "ort-cpu": ORT_CPU,
    "openvino": Target("openvino", norms="group"),  # a kernel that takes the activation along
    "cuda": Target("cuda", affines="elementwise"),  # a depthwise Conv is a kernel of its own there
    "tensorrt": Target("tensorrt", norms="group"),  # its parser makes one normalization layer of it
}
#: what `tune` measures; sums in two stages can share several threads
CANDIDATES = (
    PORTABLE,
    Target("portable, two-stage sums", norms="two-stage"),
    Target("portable, Mul and Add", affines="elementwise"),
    ORT_CPU,
    Target("ort-cpu, two-stage sums", norms="two-stage", blocked=True),
)


def check_target(
    name: str, *, opset_version: int, dtype: str, dynamic_batch: bool, external_data: bool, tune: bool
) -> None:
    """Raises ConfigError if the target `name` has no way to do what else is asked for."""
    if tune and name != "auto":
        raise ConfigError(f"tuning chooses a target, and {name} is given: use target auto")
    if name == "auto":
        return
    target = TARGETS[name]
    if opset_version < target.oldest_opset:
        raise ConfigError(
            f"target {name} needs opset {target.oldest_opset} or later, for GroupNormalization; "
            f"{opset_version} is given, or is all that the onnxruntime asked for can load"
        )
    if target.blocked and dtype != "float32":
        raise ConfigError(f"target {name} is for float32: onnxruntime has no such layout for {dtype}")
    if target.blocked and external_data:
        raise ConfigError(f"target {name} writes one file: leave out external data")
    if name == "openvino" and not dynamic_batch:
        raise ConfigError(
            "target openvino needs a dynamic batch: OpenVINO 2026.4 was seen to crash on GroupNormalization "
            "of a fixed one (mobilenet_v2); use target portable"
        )
