"""The names of the inputs and outputs of an ONNX graph."""

import dataclasses
from collections.abc import Sequence

import onnx_ir

from pn_compiler.base.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Names:
    """What the user calls the inputs and outputs. Empty: as the parameters of forward; and "output", or
    "output_0" and so on.

    Raises:
        ConfigError: a name is empty or there twice.
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
    """Gives the inputs and outputs of `graph` their names; an inner value of such a name gets another.

    Raises:
        ConfigError: there are more or fewer of them.
    """
    inputs = names.inputs or tuple(str(value.name) for value in graph.inputs)
    outputs = names.outputs or _default_outputs(graph, inputs)
    wanted = {**_pair("input", graph.inputs, inputs), **_pair("output", graph.outputs, outputs)}
    taken = {*wanted.values()}
    inner = [*graph.inputs, *graph.initializers.values()]
    inner += [value for node in graph.all_nodes() for value in node.outputs]
    for value in inner:
        if value.name in taken and wanted.get(value) != value.name:
            value.name = f"{value.name}.inner"
    for value, name in wanted.items():
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
