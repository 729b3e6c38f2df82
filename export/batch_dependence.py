"""Whether the outputs of a sample depend on the others in its batch, as those of BatchNorm may."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pn_compiler.export.verify import TOLERANCE, batch_size, imitate, own_leaves
from pn_compiler.running.evaluation import seed_everything, untouched
from pn_compiler.running.inputs import Inputs


def batch_dependence(model: nn.Module, example: Inputs, *, dynamic_batch: bool) -> float:
    """How much the outputs of the first sample of a batch change when the others become copies of it.

    Args:
        model: it is run in eval mode and left as it was.
        example: inputs like those; the first axis is the batch.
        dynamic_batch: whether batches may have other sizes than in the example.

    Returns:
        The largest change, relative to the largest magnitude of that output; 0 if it is rounding, if there
        is one sample in a batch, or if outputs vary from call to call anyway.
    """
    mixed = imitate(example, 2 if dynamic_batch else None)
    size = batch_size(mixed)
    if size < 2:
        return 0.0
    alike = mixed.map(lambda x: x[:1].expand_as(x).clone() if x.dim() and len(x) == size else x)
    with untouched(model, keep_state=True):
        try:
            outputs, others = (_firsts(model, inputs, size) for inputs in (mixed, alike))
            change = _change(outputs, others)
            if change <= TOLERANCE or _change(outputs, _firsts(model, mixed, size)) > 0:
                return 0.0
        except Exception:  # the comparison with the file says why it does not run, or does not run alike
            return 0.0
    return change


def _firsts(model: nn.Module, inputs: Inputs, size: int) -> list[Tensor]:
    """What each output that has rows for the samples gives for the first of them."""
    seed_everything()
    leaves = [leaf for leaf in own_leaves(model, inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    return [_real(leaf[0]).double() for leaf in leaves if len(leaf) and len(leaf) % size == 0]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _change(outputs: list[Tensor], others: list[Tensor]) -> float:
    pairs: Any = zip(outputs, others, strict=False)
    return max((_distance(a, b) for a, b in pairs if a.shape == b.shape), default=0.0)


def _distance(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest magnitude; infinity where only one of them is a number."""
    if not one.numel() or torch.equal(one.nan_to_num(), other.nan_to_num()):
        return 0.0
    difference, largest = float((one - other).abs().max()), float(one.abs().max())
    if not math.isfinite(difference):
        return math.inf
    return difference / largest if largest else difference
