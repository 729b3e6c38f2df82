"""What the rewrites of an ONNX graph share: constants, sizes, and the run of one rule."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet


def apply_rule(
    model: onnx_ir.Model,
    pattern: Callable[..., Any],
    check: Callable[..., bool],
    rewrite: Callable[..., Any],
    *,
    commute: bool = False,
) -> int:
    """Replaces each match of a pattern, and removes the constants that nothing reads afterwards.

    Args:
        model: edited in place.
        pattern: builds the operators to look for; its variables are the arguments of the others.
        check: whether a match is to be replaced.
        rewrite: builds what stands in its place. Its results keep names, types and shapes.
        commute: whether operands of Add and Mul match in either order.

    Returns:
        How many matches were replaced.
    """
    rules = RewriteRuleSet([RewriteRule(pattern, rewrite, check)], commute=commute)
    count = int(rules.apply_to_model(model))
    if count:
        RemoveUnusedNodesPass()(model)
    return count


def is_constant(value: onnx_ir.Value) -> bool:
    return value.const_value is not None


def contents(constant: onnx_ir.Value) -> np.ndarray[Any, Any]:
    """What is in an initializer, or in the file that it refers to."""
    assert constant.const_value is not None
    return constant.const_value.numpy()


def sizes(value: onnx_ir.Value) -> list[int]:
    """The shape of a value, -1 where unknown; empty if its rank is unknown."""
    return [size if isinstance(size, int) else -1 for size in value.shape or ()]


def constant_input(node: onnx_ir.Node, index: int) -> np.ndarray[Any, Any] | None:
    """The contents of an input of `node`; None if it is computed, or not there."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or not is_constant(value) else contents(value)
