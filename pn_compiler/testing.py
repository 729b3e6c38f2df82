"""Assertions about converted networks, for this project's tests and for yours."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

#: largest difference, relative to the largest magnitude, that rounding explains in a deep network
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def relative_error(got: Any, expected: Any) -> float:
    """Largest difference of two tensors, or of two structures of them, relative to the largest magnitude."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True)
    return max(_relative_error(g, e) for g, e in pairs)


def _relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape, f"{tuple(got.shape)} instead of {tuple(expected.shape)}"
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_same_outputs(got: Any, expected: Any, *, tolerance: float | None = None) -> None:
    """Asserts that outputs agree to rounding in the dtype of `got`, or to `tolerance`."""
    first: Tensor = pytree.tree_leaves(got)[0]
    limit = TOLERANCES[first.dtype] if tolerance is None else tolerance
    error = relative_error(got, expected)
    assert error <= limit, f"relative error {error:.1e} above {limit:.1e}"  # nan fails, too


def assert_batch_independent(model: nn.Module, x: Tensor) -> None:
    """Asserts that each sample's output is the same whatever samples share its batch."""
    together = model(x)
    for index in range(x.shape[0]):
        alone = model(x[index : index + 1])
        assert_same_outputs(alone, pytree.tree_map(lambda t, i=index: t[i : i + 1], together))


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
