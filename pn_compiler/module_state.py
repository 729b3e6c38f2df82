"""What a forward does to its modules, besides computing outputs."""

import sys

import torch
import torch.utils.checkpoint
from torch import fx, nn


class ModuleState:
    """The attributes of all modules of a model before a trace, which runs their code once, on proxies.

    A forward that counts calls or keeps a running value changes attributes. A graph would do neither, so
    such a module has to stay as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = {
            path: (module, dict(vars(module)), dict(module._buffers))
            for path, module in model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)
        }
        buffers = (buffer for buffer in model.buffers() if not buffer.is_inference())
        self._values = {buffer: (buffer._version, buffer.detach().clone()) for buffer in buffers}

    def changes(self) -> tuple[set[str], set[tuple[str, str]]]:
        """(paths of modules whose numbers or tensors changed, (path, attribute) of values merely stored)."""
        changed, stored = set(), set()
        overwritten = self._overwritten()
        for path, (module, attributes, buffers) in self._held.items():
            old, new = attributes | buffers, vars(module) | module._buffers
            for name in new.keys() - {"training"}:
                if new[name] is old.get(name):
                    continue
                if isinstance(old.get(name), torch.Tensor | int | float | str):
                    changed.add(path)
                elif isinstance(new[name], fx.Proxy):
                    stored.add((path, name))
            if any(buffer in overwritten for buffer in buffers.values()):
                changed.add(path)
        return changed, stored

    def _overwritten(self) -> set[torch.Tensor | None]:
        return {buffer for buffer, (version, _) in self._values.items() if buffer._version != version}

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes the changes."""
        for buffer in self._overwritten():
            assert buffer is not None
            buffer.copy_(self._values[buffer][1])
        for module, attributes, buffers in self._held.values():
            for name in vars(module).keys() - attributes.keys():
                if isinstance(vars(module)[name], fx.Proxy):  # others are constants of the graph
                    object.__delattr__(module, name)
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def inside_checkpoint() -> bool:
    """Whether the code that runs was called by torch.utils.checkpoint, which leaves no trace in a graph."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
    return False
