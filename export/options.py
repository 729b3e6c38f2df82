"""The options of an export, validated once."""

import dataclasses
from collections.abc import Sequence

from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import check_flags, one_of
from pn_compiler.export.io_names import Names
from pn_compiler.export.rewrites.half import DType, check_dtype
from pn_compiler.export.runtimes import DEFAULT_OPSET, choose_opset
from pn_compiler.export.targets import GROUP_NORM_OPSET, TARGETS, TargetName, check_target


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Options of `pn_compiler.export_onnx`; see there for their meaning."""

    target: TargetName = "portable"
    tune: bool = False
    opset_version: int = DEFAULT_OPSET
    dynamic_batch: bool = True
    external_data: bool = False
    dtype: DType = "float32"
    names: Names = dataclasses.field(default_factory=Names)
    verify: bool = True

    @classmethod
    def of(
        cls,
        *,
        target: TargetName,
        tune: bool,
        opset_version: int | None,
        target_ort: str | None,
        dynamic_batch: bool,
        external_data: bool,
        dtype: DType,
        input_names: Sequence[str],
        output_names: Sequence[str],
        verify: bool,
    ) -> "ExportOptions":
        """What the user gave, with the opset chosen.

        Raises:
            ConfigError: an option that does not exist, or two that exclude each other.
            ExportError: there is no such opset.
        """
        for key, value in {"input_names": input_names, "output_names": output_names}.items():
            if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
                raise ConfigError(f"{key}={value!r:.80}: expected a list of names")
        check_flags(tune=tune, dynamic_batch=dynamic_batch, external_data=external_data, verify=verify)
        one_of("target", target, (*TARGETS, "auto"))
        if not isinstance(target_ort, str | None):
            raise ConfigError(f"target_ort={target_ort!r:.80}: expected a version such as '1.18'")
        group_norm = target != "auto" and TARGETS[target].norms == "group"
        opset_version = choose_opset(
            opset_version, target_ort, GROUP_NORM_OPSET if group_norm else DEFAULT_OPSET
        )
        check_dtype(dtype, opset_version)
        check_target(
            target, opset_version=opset_version, dtype=dtype, dynamic_batch=dynamic_batch,
            external_data=external_data, tune=tune,
        )  # fmt: skip
        if not verify and target in ("ort-cpu", "auto"):
            raise ConfigError(f"target {target} is only written verified: leave verification on")
        return cls(
            target=target, tune=tune, opset_version=opset_version, dynamic_batch=dynamic_batch,
            external_data=external_data, dtype=dtype, verify=verify,
            names=Names(tuple(input_names), tuple(output_names)),
        )  # fmt: skip
