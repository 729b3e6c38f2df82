"""Copies of a user's model, and the model inside its wrappers."""

import copy
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.swa_utils import AveragedModel

from pn_compiler.base.errors import UnsupportedModelError, first_line
from pn_compiler.inspection.batch_norms import is_batch_norm
from pn_compiler.inspection.captured import copy_with_functions
from pn_compiler.inspection.fake_tensors import copy_fake
from pn_compiler.inspection.model_checks import check_module, refuse_uninitialised
from pn_compiler.running.evaluation import has_graph_for_each_mode


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside torch.compile, DataParallel, DistributedDataParallel and AveragedModel.

    Raises:
        ConfigError: `model` is no module.
        UnsupportedModelError: it has uninitialised lazy modules.
    """
    check_module(model)
    refuse_uninitialised(model)
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    while True:
        inner = getattr(model, "_orig_mod", model.module if isinstance(model, wrappers) else None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def copy_model(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A deep copy of `model`.

    Args:
        model: left untouched.
        share_parameters: let the copy hold the same parameters; only use it where nothing writes to them.

    Raises:
        UnsupportedModelError: it has uninitialised lazy modules, or cannot be copied.
    """
    refuse_uninitialised(model)
    if is_batch_norm(model):
        raise UnsupportedModelError("the model itself is a BatchNorm: wrap it, as in nn.Sequential(model)")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("TorchScript has no modules to convert: use the original nn.Module")
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share_parameters else {}
    for module in model.modules():
        for value in vars(module).values():  # by hooks that compute them anew before each call: weight_norm,
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # spectral_norm, pruning
                memo[id(value)] = value.detach().clone()
        if isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = _copy_script(module)
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, FakeTensor) and id(tensor) not in memo:  # their own deepcopy fails
            memo[id(tensor)] = copy_fake(tensor)
    try:
        return _in_modes_of(model, copy_with_functions(model, memo))
    except Exception as error:
        raise UnsupportedModelError(f"the model cannot be copied: {first_line(error)}") from error


def copy_structure(model: nn.Module) -> nn.Module | None:
    """A copy of `model` whose parameters and buffers are on the meta device; None if there can be none."""
    if any(isinstance(module, torch.jit.ScriptModule | fx.GraphModule) for module in model.modules()):
        return None
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, FakeTensor):
            return None
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        learns = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if learns else empty
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().to("meta")
    try:
        return _in_modes_of(model, copy_with_functions(model, memo))
    except Exception:  # `copy_model` has copied it, but for its tensors: nobody needs to hear
        return None


def _in_modes_of(model: nn.Module, copied: nn.Module) -> nn.Module:
    """Puts `copied` into the train/eval modes of `model`: torchvision's feature extractors lose theirs."""
    modes = {name: module.training for name, module in model.named_modules()}
    modules = dict(copied.named_modules())
    for name, module in modules.items():
        if has_graph_for_each_mode(module) and module.training != modes.get(name, module.training):
            module.train(modes[name])
    for name, module in modules.items():
        if not isinstance(module, torch.jit.ScriptModule):
            module.training = modes.get(name, module.training)
    return copied


def _copy_script(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A deep copy whose parameters are autograd leaves, like the original's."""
    with torch.no_grad():
        copied = copy.deepcopy(module)
    for new, old in zip(copied.parameters(), module.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return copied
