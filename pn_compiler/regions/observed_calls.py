"""The arguments that modules inside a model are called with, for those that are traced on their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pn_compiler.inspection.fake_tensors import has_values
from pn_compiler.running.evaluation import untouched
from pn_compiler.running.inputs import Inputs
from pn_compiler.tracing.fixed_arguments import tensors_in


class ObservedCalls:
    """The calls of modules inside a model in eval mode. The model runs when they are first needed.

    Args:
        model: left as it was.
        inputs: returns arguments of a call; None if there are none.
    """

    def __init__(self, model: nn.Module, inputs: Callable[[], Inputs | None]) -> None:
        self._model, self._inputs = model, inputs
        self._calls: dict[str, list[Inputs]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "ObservedCalls":
        return self  # copies of a trace need no copy of the model

    def of(self, path: str) -> Inputs | None:
        """Arguments like those that the module at `path` is called with: tensors of the same kind and shape.

        None if it is not called, its calls differ in the number of dimensions, or the model did not run.
        """
        if self._calls is None:
            self._calls = {}
            self._run()
        calls = self._calls.get(path, [])
        ranks = {tuple(x.dim() for x in tensors_in((call.args, dict(call.kwargs)))) for call in calls}
        return calls[0] if len(ranks) == 1 else None

    def _run(self) -> None:
        inputs = self._inputs()
        tensors = (*self._model.parameters(), *self._model.buffers())
        if inputs is None or not all(map(has_values, (*tensors, *inputs.tensors()))):
            return
        handles = []
        try:
            with untouched(self._model, keep_state=True):
                for path, module in self._model.named_modules():
                    if isinstance(module, torch.jit.ScriptModule):
                        continue
                    hook = functools.partial(self._note, path)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                inputs.call(self._model)
        except Exception:  # comparing the model with its trace will report it
            self._calls = {}
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        assert self._calls is not None
        call = Inputs(*pytree.tree_map_only(Tensor, _without_memory, (args, kwargs)))
        self._calls.setdefault(path, []).append(call)


def _without_memory(tensor: Tensor) -> Tensor:
    return tensor.detach().new_zeros(()).expand(tensor.shape)
