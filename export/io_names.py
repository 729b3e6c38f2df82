"""The names of the inputs and outputs of an ONNX graph."""

import dataclasses
from collections.abc import Sequence

import onnx_ir

from pn_compiler.base.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Names:
    """The user's names of the inputs and outputs.

    By default, inputs are named after the parameters of forward, and outputs "output", or "output_0" and so
    on.

    Raises:
        ConfigError: a name is empty or occurs twice.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, names in {"input_names": self.inputs, "output_names": self.outputs}.items():
            if not all(names):
                raise ConfigError(f"{option}={names}: one is empty")
        names = (*self.inputs, *self.outputs)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"input_names={self.inputs}, output_names={self.outputs}: {twice} is there twice"
            )


def rename(graph: onnx_ir.Graph, names: Names) -> None:
    """Renames the inputs and outputs of `graph`; an inner value with a conflicting name is renamed.

    Raises:
        ConfigError: there are more or fewer names than values.
    """
    inputs = names.inputs or tuple(str(value.name) for value in graph.inputs)
    outputs = names.outputs or _default_outputs(graph, inputs)
    new_names = {**_pair("input", graph.inputs, inputs), **_pair("output", graph.outputs, outputs)}
    taken = {*new_names.values()}
    inner = [*graph.inputs, *graph.initializers.values()]
    inner += [value for node in graph.all_nodes() for value in node.outputs]
    for value in inner:
        if value.name in taken and new_names.get(value) != value.name:
            value.name = f"{value.name}.inner"
    for value, name in new_names.items():
        value.name = name


def _default_outputs(graph: onnx_ir.Graph, inputs: tuple[str, ...]) -> tuple[str, ...]:
    count = len(graph.outputs)
    if len(set(graph.outputs)) < count:  # a value that is returned twice keeps its name
        return tuple(str(value.name) for value in graph.outputs)
    names = ("output",) if count == 1 else tuple(f"output_{index}" for index in range(count))
    return tuple(f"{name}_result" for name in names) if {*names} & {*inputs} else names


def _pair(kind: str, values: Sequence[onnx_ir.Value], names: tuple[str, ...]) -> dict[onnx_ir.Value, str]:
    if len(names) != len(values):
        listed = ", ".join(str(value.name) for value in values)
        raise ConfigError(f"{len(names)} {kind} names for {len(values)} {kind}s: {listed}")
    return dict(zip(values, names, strict=True))
