"""The options of each stage, validated once; those of a model repository are with it.

Each is declared here and nowhere else: signatures take their defaults from the classes, ``pn-compile`` its
flags, and docs/options.md its tables.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import check_metric, check_number, is_number
from pn_compiler.base.options import about, check_kinds, freeze_lists

Norm = Literal["layer", "group", "instance", "rms"]
Anchor = float | Mapping[str, float] | Literal["auto"]
ProxyPadding = Literal["activation", "output"]
WarmStart = Literal["auto", "running_stats", "calibrate", "none"]
Logits = Literal["auto", "all", "none"]
StaticStatistics = Literal["auto", "all"]
TargetName = Literal["portable", "ort-cpu", "openvino", "cuda", "tensorrt", "auto"]
DType = Literal["float32", "float16", "bfloat16"]
MetricFunction = Callable[[Any, Any], float]  # (outputs, labels) -> higher is better

DEFAULT_NUM_GROUPS = 32  # Wu & He 2018, "Group Normalization"
MIN_CHANNELS_PER_GROUP = 8
DEFAULT_ANCHOR = 0.875  # measured on real networks: docs/real_networks.md


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """Options of `pn_compiler.transform`; see there for their meaning."""

    norm: Norm | None = dataclasses.field(
        default=None,
        metadata=about(
            "what a normalizer takes its statistics over: all channels, groups, or each alone; rms: the mean "
            "square alone, over all channels, about the mean of the training set. Without, rms, but layer "
            "with --warm-start none"
        ),
    )
    num_groups: int | None = dataclasses.field(
        default=None,
        metadata=about("groups of --norm group, which it implies, or of --norm rms", metavar="G"),
    )
    anchor: Anchor | None = dataclasses.field(
        default=None,
        metadata=about(
            "share of the training set's variance in that of an instance, 0 to 1; 1 with --norm rms is "
            "BatchNorm as it is evaluated; auto: for each BatchNorm the least that --anchor-budget allows "
            "on the samples of --calibrate. In Python also a mapping, from the path of a BatchNorm. Without, "
            f"{DEFAULT_ANCHOR:g} where --norm rms starts from running statistics, else 0",
            metavar="B", words=("auto",),
        ),
    )  # fmt: skip
    anchor_budget: float = dataclasses.field(
        default=0.03,
        metadata=about(
            "with --anchor auto: the largest divergence from the original network, in nats, of outputs that "
            "are logits, or relative error of others; with --metric, the most that it may lose",
            metavar="E",
        ),
    )
    metric: str | MetricFunction | None = dataclasses.field(
        default=None,
        metadata=about(
            "a function (outputs, labels), higher is better, of which `anchor_budget` is with "
            "anchor='auto'; batches of the calibration are (inputs, labels)",
            flag="",
        ),
    )
    proxy: bool = dataclasses.field(
        default=True, metadata=about("add proxy normalization where an activation follows")
    )
    proxy_padding: ProxyPadding = dataclasses.field(
        default="activation",
        metadata=about("whether zeros are padded before the proxy shift, or to its output"),
    )
    warm_start: WarmStart = dataclasses.field(
        default="auto",
        metadata=about(
            "what weight and bias are computed from, if not from --calibrate; auto: the running statistics "
            "where a BatchNorm was trained",
            implied=("calibrate",),
        ),
    )
    norm_only_bias: bool = dataclasses.field(
        default=True,
        metadata=about("whether a normalizer that starts cold, without activation, has a bias", flag=""),
    )
    leaves: Sequence[str | type] = dataclasses.field(
        default=(),
        metadata=about(
            "a module, such as backbone.neck, whose forward must not be traced",
            flag="--leaf", metavar="PATH", repeated=True,
        ),
    )  # fmt: skip
    strict: bool = dataclasses.field(
        default=False, metadata=about("refuse the model, with exit status 3, if a BatchNorm is refused")
    )
    proxy_eps: float = 0.03

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_kinds(self)
        if self.num_groups is not None:
            check_number("num_groups", self.num_groups, "a positive integer", 1, whole=True)
            if self.norm == "instance":
                raise ConfigError("num_groups goes with norm='group', not with norm='instance'")
            if self.norm in ("layer", None):
                object.__setattr__(self, "norm", "group")  # num_groups alone means GroupNorm
        elif self.norm is None:
            object.__setattr__(self, "norm", "layer" if self.warm_start == "none" else "rms")
        if self.anchor is not None:
            _check_anchor(self.anchor)
        check_number("anchor_budget", self.anchor_budget, "an error of 0 or more, such as 0.03", 0)
        if self.anchor != "auto" and self.anchor_budget != TransformConfig.anchor_budget:
            raise ConfigError("anchor_budget has no effect without anchor='auto'")
        check_metric(self.metric)
        check_number("proxy_eps", self.proxy_eps, "a positive number", math.ulp(0))

    def groups_for(self, num_channels: int) -> int:
        """Number of groups for `num_channels` channels; always a divisor of it.

        "layer" is one group, as is "rms" without ``num_groups``, "instance" one group a channel. With
        ``num_groups`` it is the greatest common divisor; "group" without takes the most groups up to 32 that
        leave 8 channels in each.
        """
        if self.norm == "instance":
            return num_channels
        if self.num_groups is not None:
            return math.gcd(num_channels, self.num_groups)
        if self.norm in ("layer", "rms"):
            return 1
        most = max(1, min(DEFAULT_NUM_GROUPS, num_channels // MIN_CHANNELS_PER_GROUP))
        return next(g for g in range(most, 0, -1) if num_channels % g == 0)

    @property
    def anchored(self) -> bool:
        """Whether normalizers hold the statistics of the population."""
        return self.norm == "rms" or self.anchor not in (None, 0)

    def anchor_for(self, path: str, *, warm: bool) -> float:
        """The anchor of the site at `path`, which starts warm or cold; 0 where a mapping names none."""
        if self.anchor == "auto":
            raise ConfigError("anchor='auto' stands for a mapping, which is not known yet")
        if self.anchor is None:
            return DEFAULT_ANCHOR if self.norm == "rms" and warm else 0.0
        return float(self.anchor.get(path, 0) if isinstance(self.anchor, Mapping) else self.anchor)

    def with_anchors(self, anchors: Mapping[str, float]) -> "TransformConfig":
        """These options with `anchors` in the place of "auto"."""
        return dataclasses.replace(self, anchor=anchors, anchor_budget=TransformConfig.anchor_budget)

    def inside(self, prefix: str) -> "TransformConfig":
        """These options for a part of the model, whose paths have no `prefix`."""
        if not (prefix and isinstance(self.anchor, Mapping)):
            return self
        own = {p.removeprefix(prefix): b for p, b in self.anchor.items() if p.startswith(prefix)}
        return dataclasses.replace(self, anchor=own)


def _check_anchor(anchor: object) -> None:
    """Raises ConfigError unless it is a number from 0 to 1, a mapping from paths to such, or "auto"."""
    if isinstance(anchor, str) and anchor == "auto":
        return
    expected = "a number from 0 to 1, a mapping from paths of BatchNorms to such numbers, or 'auto'"
    for path, value in anchor.items() if isinstance(anchor, Mapping) else [("", anchor)]:
        if not isinstance(path, str) or not is_number(value, 0, math.nextafter(1, 2)):
            raise ConfigError(f"anchor={anchor!r:.80}: expected {expected}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """Options of `pn_compiler.compile` for what follows a conversion; see there for their meaning."""

    distill_steps: int = dataclasses.field(
        default=0,
        metadata=about(
            "train the result for some steps, 150 for example, to match the outputs of the original on the "
            "samples of --calibrate",
            flag="--distill", metavar="STEPS",
        ),
    )  # fmt: skip
    distill_logits: Logits = dataclasses.field(
        default="auto",
        metadata=about(
            "which outputs hold logits of classes along dim 1, for --distill: all, with those of a "
            "segmentation network; auto: those [N, K]"
        ),
    )
    static_statistics: StaticStatistics | None = dataclasses.field(
        default=None,
        metadata=about(
            "replace instance statistics by constants from the samples of --calibrate: faster, and lossy; "
            "auto, as without a value: as many as --error-budget allows",
            bare="auto",
        ),
    )
    error_budget: float = dataclasses.field(
        default=0.01,
        metadata=about(
            "largest relative error of the output by --static-statistics; with --metric, the most that it "
            "may lose",
            metavar="E",
        ),
    )
    metric: str | MetricFunction | None = dataclasses.field(
        default=None,
        metadata=about(
            "a function (outputs, labels), higher is better, that decides what --distill keeps and what "
            "--error-budget and --anchor-budget allow; the samples of --calibrate are a folder for each "
            "class, or a function that yields (inputs, labels)",
            metavar="PACKAGE.MODULE:FUNCTION",
        ),
    )
    benchmark: bool = dataclasses.field(
        default=False,
        metadata=about("measure the file, in onnxruntime, beside that of the same network with BatchNorm"),
    )

    def __post_init__(self) -> None:
        check_number("error_budget", self.error_budget, "an error of 0 or more, such as 0.01", 0)
        check_number("distill_steps", self.distill_steps, "a number of steps, 0 or more", 0, whole=True)
        check_kinds(self)
        if self.distill_logits != "auto" and not self.distill_steps:
            raise ConfigError(f"distill_logits={self.distill_logits!r} has no effect without distill_steps")
        check_metric(self.metric)


_BOUNDS = {
    "steps": (0, math.inf, "0 or more"),
    "batch_size": (1, math.inf, "1 or more"),
    "max_samples": (2, math.inf, "2 or more"),
    "seed": (-(2**63), 2**63, "a whole number"),
    "lr": (math.ulp(0), math.inf, "a number above 0"),
    "held_out": (math.ulp(0), 1, "a share above 0 and below 1"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Options of `pn_compiler.distill` that are numbers or choices; see there for their meaning."""

    steps: int = dataclasses.field(default=150, metadata=about("of the optimizer; 0 only measures", flag=""))
    batch_size: int = dataclasses.field(default=16, metadata=about("samples in a step", flag=""))
    lr: float = dataclasses.field(default=5e-4, metadata=about("the highest learning rate", flag=""))
    seed: int = dataclasses.field(
        default=0, metadata=about("of the held-out part and the order of samples", flag="")
    )
    max_samples: int = dataclasses.field(
        default=4096, metadata=about("how many are used, the held-out ones included", flag="")
    )
    held_out: float = dataclasses.field(
        default=0.2, metadata=about("share of the samples that is never trained on", flag="")
    )
    logits: Logits = dataclasses.field(
        default="auto", metadata=about("which outputs hold logits of classes along dim 1", flag="")
    )
    metric: str | MetricFunction | None = dataclasses.field(
        default=None,
        metadata=about("a function (outputs, labels), higher is better, by which states are kept", flag=""),
    )

    def __post_init__(self) -> None:
        check_kinds(self)
        check_metric(self.metric)
        for name, (low, high, expected) in _BOUNDS.items():
            value = getattr(self, name)
            if not is_number(value, low, high, whole=name not in ("lr", "held_out")):
                raise ConfigError(f"{name}={value!r:.80} is impossible: expected {expected}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """Options of `pn_compiler.freeze_statistics`; see there for their meaning."""

    budget: float | None = dataclasses.field(
        default=None,
        metadata=about(
            "largest relative error of the output, or the most that `metric` may lose; None freezes all "
            "sites",
            flag="",
        ),
    )
    metric: str | MetricFunction | None = dataclasses.field(
        default=None,
        metadata=about("a function (outputs, labels), higher is better, of which `budget` is", flag=""),
    )
    held_out: float = dataclasses.field(
        default=0.25, metadata=about("share of the samples on which errors are measured", flag="")
    )
    max_samples: int = dataclasses.field(default=1024, metadata=about("how many are read at most", flag=""))

    def __post_init__(self) -> None:
        if self.budget is not None:
            check_number("budget", self.budget, "an error of 0 or more, such as 0.01, or None", 0)
        check_metric(self.metric)
        check_number("held_out", self.held_out, "a share above 0 and below 1", math.ulp(0), 1)
        check_number("max_samples", self.max_samples, "2 or more", 2, whole=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of `pn_compiler.export_onnx`; see there for their meaning.

    `pn_compiler.export.ExportOptions` checks them against what runtimes and targets can do.
    """

    target: TargetName = dataclasses.field(
        default="portable",
        metadata=about(
            "what the file is for: any runtime; onnxruntime on CPUs like this one, on which it is the "
            "fastest; OpenVINO; onnxruntime on a GPU; TensorRT; or what --tune found"
        ),
    )
    tune: bool = dataclasses.field(
        default=False,
        metadata=about(
            "with --target auto: measure on this machine, unless it was done before, and keep the fastest"
        ),
    )
    threads: int | None = dataclasses.field(
        default=None,
        metadata=about(
            "with --tune or --benchmark: how many the file will be run with (default: one for each core)",
            metavar="N",
        ),
    )
    opset_version: int | None = dataclasses.field(
        default=None,
        metadata=about(
            "18 to 24 (default: 20, which onnxruntime 1.17 loads)",
            flag="--opset", metavar="N",
        ),
    )  # fmt: skip
    target_ort: str | None = dataclasses.field(
        default=None, metadata=about("the onnxruntime that must load it, as 1.18", metavar="VERSION")
    )
    dynamic_batch: bool = dataclasses.field(
        default=True,
        metadata=about(
            "take any batch size; with --static-batch only that of the input", flag="--static-batch"
        ),
    )
    dynamic_axes: Sequence[str] | Mapping[str, Mapping[int, str]] = dataclasses.field(
        default=(),
        metadata=about(
            "sizes that may vary besides the batch: H and W of images, D of volumes, L of sequences; in "
            "Python also axes of inputs by name, as {'x': {2: 'height'}}",
            flag="--dynamic", metavar="H,W",
        ),
    )  # fmt: skip
    input_names: Sequence[str] = dataclasses.field(
        default=(), metadata=about("of the inputs in the file", metavar="A,B")
    )
    output_names: Sequence[str] = dataclasses.field(
        default=(), metadata=about("of the outputs in the file", metavar="A,B")
    )
    dtype: DType = dataclasses.field(
        default="float32",
        metadata=about("of weights and activations; inputs, outputs and normalizers stay float32"),
    )
    external_data: bool = dataclasses.field(
        default=False,
        metadata=about(
            "write the weights to FILE.data, beside the ONNX file; above 2 GB this is done in any case"
        ),
    )
    verify: bool = dataclasses.field(default=True, metadata=about("compare with PyTorch before writing"))
    allow_batch_dependent: bool = dataclasses.field(
        default=False,
        metadata=about(
            "write the file even if the outputs of a sample depend on the others in its batch; without it "
            "that is an error, with exit status 4"
        ),
    )

    def __post_init__(self) -> None:
        freeze_lists(self)


def norm_name(num_groups: int, num_channels: int) -> Norm:
    """The usual name of a normalizer with `num_groups` groups over `num_channels` channels."""
    if num_groups == 1:
        return "layer"
    return "instance" if num_groups == num_channels else "group"
