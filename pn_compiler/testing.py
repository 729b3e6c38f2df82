"""Assertions about converted networks, for this project's tests and for yours."""

import math
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

#: largest difference, relative to the largest magnitude, that rounding explains in a deep network
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference of two tensors, or of two structures of them, relative to the largest magnitude.

    It is infinite where a value is not finite, or where leaves that are not tensors differ.
    """
    return max(_relative_error(g, e) for g, e in _pairs(actual, expected))  # no nan: max would pass over it


def _pairs(actual: Any, expected: Any) -> list[tuple[Any, Any]]:
    """Pairs of leaves that must agree. Asserts that there are as many in both, and at least one."""
    left, right = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(left) == len(right), f"{len(left)} outputs instead of {len(right)}"
    assert left, "there are no outputs to compare"
    return list(zip(left, right, strict=True))


def _relative_error(actual: Any, expected: Any) -> float:
    if not (isinstance(actual, Tensor) and isinstance(expected, Tensor)):
        return 0.0 if type(actual) is type(expected) and actual == expected else math.inf
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if not actual.numel():
        return 0.0
    dtype = torch.complex128 if actual.is_complex() or expected.is_complex() else torch.float64
    actual, expected = actual.detach().to(dtype), expected.detach().to(dtype)
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return math.inf
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_same_outputs(actual: Any, expected: Any, *, tolerance: float | None = None) -> None:
    """Asserts that outputs agree to rounding, each in the dtype that it has in `actual`, or to `tolerance`.

    Integers, booleans and leaves that are not tensors must be equal, unless a `tolerance` is given.
    """
    for g, e in _pairs(actual, expected):
        limit = _rounding(g) if tolerance is None else tolerance
        error = _relative_error(g, e)
        assert error <= limit, f"relative error {error:.1e} above {limit:.1e}"


def _rounding(value: Any) -> float:
    """The entry of `TOLERANCES` for a tensor; 0 for what is not rounded."""
    if not (isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())):
        return 0.0
    return TOLERANCES[value.dtype.to_real()]


def assert_batch_independent(model: nn.Module, x: Tensor) -> None:
    """Asserts that each sample's output is the same whatever samples share its batch, two or more."""
    assert len(x) > 1, "a batch of one sample shows nothing"
    together = model(x)
    for index in range(x.shape[0]):
        alone = model(x[index : index + 1])
        among_others = pytree.tree_map_only(Tensor, operator.itemgetter(slice(index, index + 1)), together)
        assert_same_outputs(alone, among_others)


def count_modules(model: nn.Module, *types: type[nn.Module]) -> int:
    """How many modules of `model` are of one of `types`, subclasses not counted."""
    return sum(type(module) in types for module in model.modules())


@torch.no_grad()
def randomize_batch_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every BatchNorm random affine parameters and running statistics, as if it were trained."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        if module.affine:
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)
    return model
