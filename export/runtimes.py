"""The opset and IR versions that each onnxruntime version loads."""

import re

from pn_compiler.base.errors import ConfigError, ExportError

#: The newest opset whose GroupNorm lowering has CPU kernels; with IR 9, onnxruntime 1.17 and later load it.
DEFAULT_OPSET = 20
OPSETS = range(18, 25)

#: onnxruntime -> highest opset and IR version that it loads, measured by loading models. A version in between
#: loads at least what the previous one loads.
CEILINGS = {(1, 17): (20, 9), (1, 18): (21, 10), (1, 22): (22, 10), (1, 23): (23, 11), (1, 24): (24, 12)}


def choose_opset(opset_version: int | None, target_ort: str | None, default: int = DEFAULT_OPSET) -> int:
    """The opset that the user gave, else `default`, lowered to what `target_ort` loads.

    Raises:
        ConfigError: `target_ort` is not a version, is too old, or cannot load the given opset.
        ExportError: there is no such opset.
    """
    highest, _ = (max(OPSETS), 0) if target_ort is None else ceiling(target_ort)
    if opset_version is None:
        return min(default, highest)
    if isinstance(opset_version, bool) or opset_version not in OPSETS:
        raise ExportError(f"opset {opset_version!r:.80}: expected {OPSETS.start} to {OPSETS.stop - 1}")
    if opset_version > highest:
        raise ConfigError(f"onnxruntime {target_ort} loads opset {highest} at most, not {opset_version}")
    return opset_version


def check_loadable(target_ort: str, opset_version: int, ir_version: int) -> None:
    """Raises ConfigError if the onnxruntime `target_ort` cannot load a file of these versions."""
    opset, ir = ceiling(target_ort)
    if opset_version > opset or ir_version > ir:
        raise ConfigError(
            f"onnxruntime {target_ort} loads opset {opset} and IR {ir} at most, not {opset_version} "
            f"and {ir_version}"
        )


def ceiling(target_ort: str) -> tuple[int, int]:
    """Highest opset and IR version of an onnxruntime such as "1.18" or "1.18.1"."""
    match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", target_ort)
    oldest = ".".join(map(str, min(CEILINGS)))
    if match is None:
        raise ConfigError(f"target_ort {target_ort!r}: expected a version such as 1.18")
    version = (int(match[1]), int(match[2]))
    if version < min(CEILINGS):
        raise ConfigError(
            f"target_ort {target_ort}: the oldest onnxruntime that can be asked for is {oldest}"
        )
    return CEILINGS[max(known for known in CEILINGS if known <= version)]


def oldest_onnxruntime(opset_version: int, ir_version: int) -> str:
    """The oldest onnxruntime measured to load such a file; "newer than ..." if none did."""
    fitting = [v for v, (opset, ir) in CEILINGS.items() if opset >= opset_version and ir >= ir_version]
    if not fitting:
        return "newer than " + ".".join(map(str, max(CEILINGS)))
    return ".".join(map(str, min(fitting)))
