"""Checks that the numbers an exported program computes from sizes stay small."""

from typing import Any

_SIZE_BITS = 32
_MOST_BITS = 2000


def is_bounded(graph: dict[str, Any]) -> bool:
    """Whether products of sizes in a graph of torch's schema stay small: Python's integers are unbounded."""
    bits: dict[str, int] = {}
    for node in graph["nodes"]:
        if node["target"].startswith(("_operator.", "torch.sym_", "math.")):
            operands = [_operand_bits(item["arg"], bits) for item in node["inputs"]]
            product = node["target"] == "_operator.mul"
            size = sum(operands) if product else max(operands, default=0) + 1
            if size > _MOST_BITS:
                return False
            for output in node["outputs"]:
                for value in output.values():
                    if isinstance(value, dict) and "as_name" in value:
                        bits[value["as_name"]] = size
    return True


def _operand_bits(argument: dict[str, Any], bits: dict[str, int]) -> int:
    value = next(iter(argument.values()))
    if isinstance(value, dict):
        value = next(iter(value.values()))
    if isinstance(value, int):
        return value.bit_length()
    return bits.get(value, _SIZE_BITS) if isinstance(value, str) else _SIZE_BITS
