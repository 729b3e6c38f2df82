"""The arguments with which a model is called, traced, exported and verified."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from pn_compiler.base.errors import ConfigError
from pn_compiler.inspection.fake_tensors import first_fake


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call: tensors, and any nesting of tuples, lists and dicts of them.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> "Inputs | None":
        """A user's example inputs: a tuple or list of arguments, or a single one; None if none were given."""
        if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
            raise ConfigError(f"example_kwargs={example_kwargs!r:.80}: expected a dict of arguments by name")
        kwargs = dict(example_kwargs or {})
        if example_inputs is None:
            return cls((), kwargs) if kwargs else None
        if isinstance(example_inputs, tuple | list):
            return cls(tuple(example_inputs), kwargs)
        return cls((example_inputs,), kwargs)

    def call(self, model: nn.Module) -> Any:
        """Calls `model` on copies of the tensors, because a forward may write to its inputs."""
        copies = self.map(torch.clone)
        return model(*copies.args, **copies.kwargs)

    def by_name(self, model: nn.Module) -> dict[str, Any]:
        """Parameter of the forward of `model` -> argument. Raises TypeError if they do not fit."""
        return dict(inspect.signature(model.forward).bind(*self.args, **self.kwargs).arguments)

    def of_graph(self, gm: fx.GraphModule) -> tuple[Any, ...]:
        """Copies for the placeholders of `gm`, in order. Raises TypeError if they do not fit."""
        copies = self.map(torch.clone)
        bound = inspect.signature(gm.forward).bind(*copies.args, **copies.kwargs)
        bound.apply_defaults()
        return tuple(gm.graph.process_inputs(*bound.args))

    def tensors(self) -> list[Tensor]:
        """All tensors in it, in the order in which torch.export takes them."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        """`function` applied to each tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    def on_meta(self) -> "Inputs":
        """The same without values."""
        return self.map(lambda x: x.detach().to("meta"))


def in_mode_of(model: nn.Module, inputs: Inputs | None) -> Inputs | None:
    """`inputs` as fake tensors of `model`'s FakeTensorMode, if it has one: others would not mix with it."""
    like = first_fake(model)
    if inputs is None or like is None:
        return inputs

    def faked(x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor) and x.fake_mode is like.fake_mode:
            return x
        with like.fake_mode:
            device = like.device if x.is_meta else x.device
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    return inputs.map(faked)
