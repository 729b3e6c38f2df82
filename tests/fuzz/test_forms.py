"""The table of forms: every one of them runs somewhere, so that none is there in vain."""

import random

import pytest
import torch
from torch import nn

from benchmarks.fuzz.forms import fill, read_forms
from benchmarks.fuzz.generate import NAMESPACE

SHAPES = (
    (3, 4),
    (3, 1, 4),
    (3, 4, 6),
    (3, 1, 8, 8),
    (3, 4, 8, 8),
    (3, 4, 8, 1),
    (3, 4, 6, 6),
    (3, 4, 4, 4, 4),
)
FORMS = [(kind, form) for kind, family in read_forms().items() for form in family.forms]


def runs(kind: str, form: str, shape: tuple[int, ...]) -> bool:
    """Whether the form takes a tensor of this shape, and another of as many, half or one pixel."""
    root = nn.Module()
    lines = fill(form, shape, random.Random(0))
    pixels = shape[2:]
    for other in (pixels, [max(1, size // 2) for size in pixels], [1] * len(pixels)):
        values = {"a": torch.randn(shape).double(), "b": torch.randn(*shape[:2], *other).double()}
        root.m = nn.Parameter(torch.ones(shape[1], *[1] * (len(shape) - 2), dtype=torch.float64))
        if "prelu" in form or "view(1, -1" in form:
            root.m = nn.Parameter(torch.ones(shape[1], dtype=torch.float64))
        scope = NAMESPACE | values | {"self": root}
        try:
            with torch.no_grad():
                if kind == "module":
                    eval(lines, scope).double().eval()(values["a"])
                else:
                    if " :: " in lines:
                        declared, lines = lines.split(" :: ")
                        del root.m
                        root.m = eval(declared, scope)
                        root.double().eval()
                    exec(lines.replace("$", ""), scope)
        except Exception:  # not for this shape
            continue
        return True
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_every_form_runs_on_some_tensor(kind: str, form: str) -> None:
    assert any(runs(kind, form, shape) for shape in SHAPES)


def test_forms_differ() -> None:
    for family in read_forms().values():
        assert len(set(family.forms)) == len(family.forms)
