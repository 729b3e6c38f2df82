"""Runs networks, and measures how far outputs are apart."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def run(model: nn.Module, args: Any) -> Any:
    """The model's outputs for copies of `args`: a forward may write to what it is given."""
    with torch.no_grad():
        return model(*pytree.tree_map(lambda x: x.clone(), args))


def gradients(model: nn.Module, args: Any) -> dict[str, Tensor | None]:
    """Gradient of the sum of squares of the outputs, by name of the parameter."""
    model.zero_grad()
    outputs = model(*pytree.tree_map(lambda x: x.clone(), args))
    loss = sum((y * y).sum() for y in pytree.tree_leaves(outputs))
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def first(outputs: Any) -> Any:
    return pytree.tree_map(lambda x: x[:1], outputs)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def difference(actual: Any, expected: Any) -> float:
    """Largest difference relative to the largest magnitude of that output, or infinite."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    return max((_difference(a, e) for a, e in pairs), default=0.0)


def _difference(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    apart = torch.where(_same(actual, expected), 0.0, (actual - expected).abs())
    error = float(apart.max() / expected.nan_to_num(0, 0, 0).abs().max().clamp_min(1e-6))
    return float("inf") if error != error else error


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def identical(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(_same(a, b).all())
