"""Checks that every function of the public API makes on its model."""

import os
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pn_compiler.base.errors import ConfigError, UnsupportedModelError


def check_module(model: object) -> None:
    """Raises ConfigError, which says what to pass instead, if `model` is not a network."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        what, instead = f"the class {model.__name__}", f"make a network of it, {model.__name__}(...)"
    elif isinstance(model, torch.export.ExportedProgram):
        what, instead = "an ExportedProgram", "give its module, program.module()"
    elif isinstance(model, Mapping):
        what, instead = "a mapping such as a state_dict", "load it into its network"
    elif isinstance(model, str | os.PathLike):
        what, instead = repr(str(model)), "load the network first; pn-compile takes files"
    else:
        what, instead = f"a value of type {type(model).__name__}", "give the network itself"
    raise ConfigError(f"expected a torch.nn.Module, got {what}: {instead}")


def refuse_uninitialised(model: nn.Module) -> None:
    """Raises UnsupportedModelError if a lazy module of `model` has not seen data yet."""
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            raise UnsupportedModelError(
                f"{name or 'the model'} is an uninitialised {type(module).__name__}: "
                "run the model once on real data before converting it"
            )


def refuse_global_hooks() -> None:
    """Raises ConfigError if global module hooks are registered: a graph would lose them."""
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    used = [kind for kind in kinds if getattr(torch.nn.modules.module, f"_global_{kind}")]
    if used:
        raise ConfigError(
            f"global {used[0].replace('_', ' ')} of torch.nn.modules.module are registered, which would run "
            "while the model is traced and not in the graph: remove them, and register them afterwards"
        )
