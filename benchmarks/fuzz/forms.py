"""The table of forms that generated networks are made of, forms.txt.

A form is lines of a forward: $a and $b are tensors that it reads, $o and $p what it makes, $m a parameter or
buffer. What does not fit the shapes at hand raises when it is tried, and another form is drawn: so no form
states what it needs. No form may mix samples. In capitals stands what is filled in when it is drawn:

    C      channels of $a                     I, J   channels, 0 < I < C, 0 <= J < C
    H      last dimension of $a               K      a number between -2 and 2
    D      a dimension behind the batch       P      a number above 0
    R, Rd  spatial dimensions; 1d, 2d or 3d   FAR    a bound far out
    ACT    an activation of the usual ones

Of "module" forms stands the expression of the module alone; of "compound" and "functional" ones, that of the
module or parameter $m in front of "::".
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_TITLE = re.compile(r"\[(?P<kind>[a-z ]+) (?P<weight>[\d.]+)\]")
_TOKENS = re.compile(r"\b(FAR|ACT|[CHIJKPDR])\b")
_PATH = Path(__file__).with_name("forms.txt")
_USUAL = (
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.SiLU()",
    "nn.GELU()",
    "nn.LeakyReLU(0.1)",
    "nn.Hardswish()",
)


class Family(NamedTuple):
    """Forms of one kind, and how often they are drawn."""

    kind: str
    weight: float
    forms: tuple[str, ...]


def read_forms(path: Path = _PATH) -> dict[str, Family]:
    """The families of the table by kind."""
    forms: list[str] = []
    found: dict[str, tuple[float, list[str]]] = {}
    for line in path.read_text().splitlines():
        if title := _TITLE.fullmatch(line):
            forms = []
            found[title["kind"]] = float(title["weight"]), forms
        elif line and not line.startswith("#"):
            forms.append(line.replace("\\n", "\n"))
    return {kind: Family(kind, weight, tuple(forms)) for kind, (weight, forms) in found.items()}


def fill(form: str, shape: Sequence[int], rng: random.Random) -> str:
    """`form` with its capitals replaced by what fits a tensor of this `shape`."""
    channels = shape[1] if len(shape) > 1 else 1
    numbers = {
        "C": channels,
        "H": shape[-1],
        "I": rng.randrange(1, channels) if channels > 1 else 1,
        "J": rng.randrange(channels),
        "K": rng.choice((-1.5, -0.5, 0.25, 0.5, 1.0, 1.5)),
        "P": rng.choice((0.1, 0.5, 0.7, 1.5, 2.0)),
        "R": len(shape) - 2,
        "ACT": rng.choice(_USUAL),
        "D": rng.randrange(1, max(2, len(shape))),
        "FAR": rng.choice((1.0, 6.0, 20.0, 31.0, 35.0, 40.0, 50.0, 90.0)),
    }
    form = form.replace("Rd", f"{max(1, len(shape) - 2)}d")
    return _TOKENS.sub(lambda match: str(numbers[match[0]]), form)
