"""The description of an input on the command line."""

import dataclasses
import re

from pn_compiler.base.errors import ConfigError

DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip
_NAME = re.compile(r"[^\W\d]\w*")
_EXPECTED = "expected [NAME:][DTYPE:]SIZES, such as tokens:int64:1,128"


@dataclasses.dataclass(frozen=True, slots=True)
class InputSpec:
    """What an input looks like.

    Attributes:
        shape: positive sizes, the batch included.
        name: of the parameter of forward; empty for the next one by place.
        dtype: name of a dtype of torch; empty for that of the network's parameters.
    """

    shape: tuple[int, ...]
    name: str = ""
    dtype: str = ""

    @classmethod
    def parse(cls, text: str) -> "InputSpec":
        """Reads ``[NAME:][DTYPE:]SIZES``. Raises ConfigError if it is something else."""
        *front, last = text.split(":")
        dtype = front.pop() if front and front[-1] in DTYPES else ""
        name = front.pop() if front else ""
        sizes = last.replace("x", ",").split(",")
        if front or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ConfigError(f"{text!r}: {_EXPECTED}")
        if name and not _NAME.fullmatch(name):
            raise ConfigError(
                f"{text!r}: {name!r} is neither a name nor one of the dtypes {', '.join(DTYPES)}"
            )
        return cls(tuple(map(int, sizes)), name, dtype)

    def __str__(self) -> str:
        """As `parse` reads it."""
        return ":".join(part for part in (self.name, self.dtype, ",".join(map(str, self.shape))) if part)
