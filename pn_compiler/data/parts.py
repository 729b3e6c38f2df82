"""The part of a network that can be compiled where the whole cannot, such as the backbone of a detector."""

import dataclasses

from torch import nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.inspection.batch_norms import is_batch_norm
from pn_compiler.nn import FoldedNorm, Normalizer

_LISTED = 8


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """A child of a network.

    Attributes:
        norms: how many normalizers it holds.
    """

    name: str
    module: nn.Module
    norms: int


def part_of(model: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`. Raises ConfigError if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        names = [name for name, _ in model.named_children()]
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise ConfigError(
            f"the model has no part {path}: its parts are {', '.join(names[:_LISTED])}{more}"
        ) from error


def part_hint(model: nn.Module) -> str:
    """How to compile the child that holds most normalizers, as the end of a message; empty if none does."""
    children = ((name, child) for name, child in model.named_children() if next(child.children(), None))
    parts = [_Part(name, child, _count(child)) for name, child in children]
    largest = max(parts, key=lambda part: part.norms, default=None)
    if largest is None or not largest.norms or 2 * largest.norms < _count(model):
        return ""
    convolutions = (m for m in largest.module.modules() if isinstance(m, nn.Conv2d))
    channels = next((m.in_channels for m in convolutions), None)
    shape = "" if channels is None else f" --input-shape 1,{channels},HEIGHT,WIDTH"
    return (
        f"; its part {largest.name}, with {largest.norms} of {_count(model)} normalizers, can be tried "
        f"alone: --part {largest.name}{shape} (compile(model.{largest.name}, ...))"
    )


def _count(module: nn.Module) -> int:
    kinds = (Normalizer, FoldedNorm, nn.GroupNorm)
    return sum(is_batch_norm(m) or isinstance(m, kinds) for m in module.modules())
