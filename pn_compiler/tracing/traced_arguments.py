"""The arguments of a traced forward: placeholders for those that vary, the rest unchanged."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pn_compiler.proxies.known_types import sample_inputs
from pn_compiler.running.inputs import Inputs
from pn_compiler.tracing.fixed_arguments import VARIES, check_fixed, check_shapes, tensors_in, varies

_EMPTY = inspect.Parameter.empty


class TracedArguments:
    """The placeholders of one trace, and what is known about them.

    Args:
        tracer: creates them.
        inputs: arguments of a call, which decide what varies; None if there are none.
        example: returns arguments of a call, which do not decide what varies; called when first needed.
        assumed: a value of the type that an unknown argument is assumed to have.

    Attributes:
        samples: a value of the type of each placeholder that varies.
    """

    def __init__(
        self,
        tracer: fx.Tracer,
        inputs: Inputs | None,
        example: Callable[[], Inputs | None],
        assumed: Any,
    ) -> None:
        self._tracer, self._inputs, self._example, self._assumed = tracer, inputs, example, assumed
        self._values: dict[fx.Node, tuple[str, Any]] = {}  # placeholder -> parameter, argument or VARIES
        self.samples: dict[fx.Node, Any] = {}

    def bind(self, forward: Callable[..., Any], root: nn.Module) -> Callable[..., Any]:
        """Binds proxies to the arguments of `forward` that vary, and values to the others.

        With inputs, numbers and anything that holds a tensor vary. Without, the first parameter and those
        without a default do.
        """
        given = None if self._inputs is None else self._inputs.by_name(root)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in inspect.signature(forward).parameters.values():
            name = parameter.name
            if parameter.kind is parameter.VAR_KEYWORD:
                extra = given.get(name, {}) if given else {}
                kwargs.update((key, self._placeholder(key, value)) for key, value in extra.items())
            elif parameter.kind is parameter.VAR_POSITIONAL:
                if given is None:
                    raise TypeError(f"how many arguments *{name} takes is unknown: pass example_inputs")
                extra = given.get(name, ())
                args += [self._placeholder(f"{name}_{i}", value) for i, value in enumerate(extra)]
            elif given is None:
                unknown = not (args or kwargs) or parameter.default is _EMPTY
                value = VARIES if unknown else parameter.default
                kwargs[name] = self._placeholder(name, value, parameter.default)
            else:
                value = given.get(name, parameter.default)
                kwargs[name] = self._placeholder(name, value, parameter.default)
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                args.append(kwargs.pop(name))
        bound = functools.partial(forward, *args, **kwargs)
        bound.__annotations__ = {}  # which Tracer.trace of torch 2.9 reads
        return bound

    def _placeholder(self, name: str, value: Any, default: Any = _EMPTY) -> Any:
        """A proxy for an argument that varies, else `value` itself, which every call must then give."""
        try:
            probe = pytree.tree_map_only(torch.Tensor, lambda _: None, value)  # no constant
            self._tracer.create_arg((None if probe is VARIES else probe, *self._defaults(default)))
        except NotImplementedError:  # a graph cannot hold it: it cannot be a constant of the graph
            return value
        proxy = self._tracer.create_proxy("placeholder", name, self._defaults(default), {})
        self._values[proxy.node] = name, value
        if value is VARIES or varies(value):
            self.samples[proxy.node] = self._assumed if value is VARIES else sample_inputs(value)
            return proxy
        check_fixed(proxy, value, name)
        return value

    @staticmethod
    def _defaults(default: Any) -> tuple[Any, ...]:
        return () if default is _EMPTY else (default,)

    def examples(self) -> dict[fx.Node, Any]:
        """The value of each placeholder in the example call; VARIES if it is unknown, or is a number.

        Shapes may depend on an integer, so an answer for this call need not hold for another.
        """
        example = self._example()
        named = {} if example is None else example.by_name(self._tracer.root)
        values = {
            node: named.get(name, VARIES) if value is VARIES else value
            for node, (name, value) in self._values.items()
        }
        return {
            node: VARIES if node in self.samples and type(value) is int else value
            for node, value in values.items()
        }

    def fix_shapes(self, graph: fx.Graph, *, channels: bool) -> None:
        """Makes `graph` check that its arguments have as many dimensions as in the example.

        With `channels`, their second size must match as well.
        """
        examples = self.examples()
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            for node, value in reversed(examples.items()):
                if node in self.samples and value is not VARIES and (tensors := tensors_in(value)):
                    fixed = tuple(
                        tuple(n if channels and axis == 1 else None for axis, n in enumerate(x.shape))
                        for x in tensors
                    )
                    graph.call_function(check_shapes, (node, fixed, str(node.target)))
