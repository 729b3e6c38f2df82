"""Where and how a model is written for servers, validated once."""

import dataclasses
import re
from pathlib import Path

from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import check_number, check_path
from pn_compiler.base.options import about, check_kinds


@dataclasses.dataclass(frozen=True)
class ModelRepository:
    """Where and how a model is written for Triton and MLServer; see `pn_compiler.export_model_repository`."""

    directory: Path = dataclasses.field(
        metadata=about(
            "write a folder that Triton and MLServer serve as it is; a model in it gets a new version",
            flag="--model-repository", metavar="DIR",
        )
    )  # fmt: skip
    name: str = dataclasses.field(metadata=about("of the model in DIR", metavar="NAME"))
    force: bool = dataclasses.field(default=False, metadata=about("replace the newest version in DIR"))
    max_batch_size: int = dataclasses.field(
        default=32, metadata=about("samples that a server may put into one batch", metavar="N")
    )

    def __post_init__(self) -> None:
        check_path("directory", self.directory)
        object.__setattr__(self, "directory", Path(self.directory))
        check_kinds(self)
        check_number("max_batch_size", self.max_batch_size, "a positive integer", 1, whole=True)
        if not isinstance(self.name, str) or not re.fullmatch(
            r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?", self.name
        ):
            raise ConfigError(f"name {self.name!r:.80}: expected letters, digits, and _ . - between them")
        if self.directory.name == "triton":
            raise ConfigError(f"{self.directory}: a folder of this name hides the package triton from torch")
