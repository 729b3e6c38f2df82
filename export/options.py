"""The options of an export, checked against what runtimes and targets can do."""

import dataclasses

from pn_compiler.base.config import ExportConfig
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.options import check_kinds
from pn_compiler.export.dynamic_axes import check_axes
from pn_compiler.export.io_names import Names
from pn_compiler.export.rewrites.half import check_dtype
from pn_compiler.export.runtimes import choose_opset
from pn_compiler.export.targets import check_target


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(ExportConfig):
    """Options of an export that can be done.

    Raises:
        ConfigError: an option that does not exist, or two that exclude each other.
        ExportError: there is no such opset.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("input_names", "output_names"):
            value = getattr(self, key)
            if not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
                raise ConfigError(f"{key}={value!r:.80}: expected a list of names")
        check_axes(self.dynamic_axes)
        check_kinds(self)
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads={self.threads}: expected at least 1")
        if not isinstance(self.target_ort, str | None):
            raise ConfigError(f"target_ort={self.target_ort!r:.80}: expected a version such as '1.18'")
        check_dtype(self.dtype, self.opset)
        check_target(self)
        if not self.verify and self.target in ("ort-cpu", "auto"):
            raise ConfigError(f"target {self.target} is only written verified: leave verification on")
        _ = self.names  # checked there

    @property
    def opset(self) -> int:
        """The operator set of the file: that of the user, or the default, as far as runtimes load it."""
        return choose_opset(self.opset_version, self.target_ort)

    @property
    def names(self) -> Names:
        """Of the inputs and outputs in the file."""
        return Names(tuple(self.input_names), tuple(self.output_names))
