"""Identifies BatchNorm modules and their kind."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.inspection.functional_norms import calls_batch_norm
from pn_compiler.inspection.hooks import has_hooks

FROZEN_BATCH_NORMS = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d", "FrozenBatchNorm3d")


_QUANTIZED = ("quantized", "qat", "intrinsic.qat", "intrinsic.quantized")


def is_batch_norm(module: nn.Module) -> bool:
    """Whether `module` is a BatchNorm of any kind; each gets a line in the report."""
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in getattr(module, "original_name", "")
    return isinstance(module, _BatchNorm) or type(module).__name__ in FROZEN_BATCH_NORMS


def closed_kind(module: nn.Module) -> str | None:
    """ "TorchScript" or "quantized" for a module that cannot be converted inside, else None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript"
    quantized = tuple(f"torch.ao.nn.{name}" for name in _QUANTIZED)
    return "quantized" if type(module).__module__.startswith(quantized) else None


def closed_diagnostic(name: str, kind: str) -> Diagnostic:
    """The diagnostic for a BatchNorm that is, or is inside, a module whose `closed_kind` is `kind`."""
    hint = "convert the original float nn.Module first, then script or quantize the result"
    return Diagnostic("PN111", name, f"it is {kind}", hint)


def batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields every BatchNorm module of `model` with its path, once each."""
    return ((name, module) for name, module in model.named_modules() if is_batch_norm(module))


def holds_batch_norm(module: nn.Module) -> bool:
    """Whether `module` contains a BatchNorm, or code that calls batch_norm as a function."""
    return any(is_batch_norm(child) or calls_batch_norm(child) for child in module.modules())


def plain_base(module: nn.Module) -> type[nn.Module]:
    """The torch.nn class of `module`, or the one that its class derives from."""
    return next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn."))


def has_plain_forward(module: nn.Module) -> bool:
    """Whether `module` uses the unmodified forward of a torch.nn BatchNorm."""
    return isinstance(module, _BatchNorm) and type(module).forward in (
        _BatchNorm.forward,
        nn.SyncBatchNorm.forward,
    )


def wraps_batch_norm(module: nn.Module) -> bool:
    """Whether `module` is a BatchNorm whose own forward wraps that of its base class.

    It may hold modules, such as the activation behind it, but no tensors besides those of a BatchNorm.
    """
    return (
        isinstance(module, _BatchNorm)
        and not has_plain_forward(module)
        and "forward" not in vars(module)
        and not (closed_kind(module) or has_hooks(module))
        and (_calls_super(module) or not list(module.children()))
        and not any(map(holds_batch_norm, module.children()))
        and set(module._parameters) <= {"weight", "bias"}
        and set(module._buffers) <= {"running_mean", "running_var", "num_batches_tracked"}
    )


class FixedMode(_BatchNorm):
    """A BatchNorm fixed in train or eval mode, like ``F.batch_norm(..., training=False)``."""

    fixed_mode: bool

    @property
    def training(self) -> bool:  # an attribute of nn.Module
        return self.fixed_mode

    @training.setter
    def training(self, mode: bool) -> None:
        """Ignores assignments, including those by train() and eval()."""

    @staticmethod
    def of(norm: _BatchNorm, training: bool) -> "FixedMode":
        """Fixes `norm` in the mode `training`, in place, and returns it."""
        fixed: Any = norm
        fixed.__class__ = next(
            cls for cls in FixedMode.__subclasses__() if isinstance(norm, cls.__bases__[1])
        )
        fixed.fixed_mode = training
        assert isinstance(fixed, FixedMode)
        return fixed


class FixedModeBatchNorm1d(FixedMode, nn.BatchNorm1d):
    """nn.BatchNorm1d in a fixed mode."""


class FixedModeBatchNorm2d(FixedMode, nn.BatchNorm2d):
    """nn.BatchNorm2d in a fixed mode."""


class FixedModeBatchNorm3d(FixedMode, nn.BatchNorm3d):
    """nn.BatchNorm3d in a fixed mode."""


class FixedModeSyncBatchNorm(FixedMode, nn.SyncBatchNorm):
    """nn.SyncBatchNorm, which accepts any rank, in a fixed mode."""


def _calls_super(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "super" in code.co_names
