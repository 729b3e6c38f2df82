"""Checks whether a model needs more memory than there is, without computing anything."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pn_compiler.base.errors import ConfigError
from pn_compiler.running.evaluation import untouched
from pn_compiler.running.inputs import Inputs


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Records the size in bytes of the largest tensor that is created."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = (x.numel() * x.element_size() for x in pytree.tree_leaves(result) if isinstance(x, Tensor))
        self.bytes = max(self.bytes, *sizes, 0)
        return result


def total_memory() -> int:
    """Bytes of memory in this machine; a terabyte where the system does not say, as on Windows."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**40


def refuse_giant_tensors(model: nn.Module, inputs: Inputs) -> None:
    """Runs `model` on tensors without values.

    Raises:
        ConfigError: one of its tensors is larger than this machine's memory. A model that needs values, or
            does not run, passes: running it will show the error.
    """
    largest = _Largest()  # type: ignore[no-untyped-call]
    state = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), (inputs.args, dict(inputs.kwargs)))
    try:
        with untouched(model), torch.no_grad(), largest:  # a forward may store what it computes
            torch.func.functional_call(model, state, args, kwargs)
    except Exception:  # user code, on tensors that it may not support
        return
    memory = total_memory()
    if largest.bytes > memory:
        shapes = ", ".join(str(list(x.shape)) for x in inputs.tensors())
        raise ConfigError(
            f"the model makes a tensor of {largest.bytes / 2**30:.0f} GB from an input of shape {shapes}, "
            f"and this machine has {memory / 2**30:.0f} GB of memory"
        )
