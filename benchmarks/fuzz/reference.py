"""The conversion by hand: the network as it came, with each batch norm computed as its record says.

Nothing is traced. The original module runs, and whenever it comes to a batch norm, of a module or functional,
a group normalization answers instead.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from pn_compiler import Site


class ByHand(nn.Module):
    """`model` with the batch norms that `sites` report as converted, converted by hand.

    `noise`, relative to its outputs, disturbs each normalizer, to see how much the network magnifies it. It
    does so as rounding would: its gradient is disturbed as much, not by the slope of the noise.
    """

    noise = 0.0

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.sites = {site.name: site for site in sites if site.kind != "skipped"}
        for name, module in list(self.model.named_modules()):
            if isinstance(module, _BatchNorm) and module.running_mean is None and name in self.sites:
                self.model.set_submodule(name, _Plain(module, self.sites[name]))

    def forward(self, *args: Any) -> Any:
        buffers = dict(self.model.named_buffers())
        owners = {name.rpartition(".")[0]: b for name, b in buffers.items() if name.endswith("running_mean")}
        found = {id(mean): self.sites[name] for name, mean in owners.items() if name in self.sites}
        found |= {
            id(mean): self.sites[f"{name}.norm"]
            for name, mean in owners.items()
            if f"{name}.norm" in self.sites  # in a module that does more than call batch_norm
        }
        with _Answer(found, self.noise):
            return self.model(*args)


class _Answer(TorchFunctionMode):
    """Answers batch norms on the running means in `sites`, by identity."""

    def __init__(self, sites: dict[int, Site], noise: float) -> None:
        super().__init__()
        self.sites, self.noise = sites, noise

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _SIGNATURES:
            call = dict(zip(_SIGNATURES[function], args, strict=False)) | kwargs
            site = self.sites.get(id(call["running_mean"]))
            if site is not None:
                y = _normalized(call, site)
                return y * (1 + self.noise * torch.cos(1e3 * y.detach())) if self.noise else y
        return function(*args, **kwargs)


#: torch.nn.functional's own is intercepted, too: while it is answered, what it calls is not
_SIGNATURES = {
    F.batch_norm: tuple(inspect.signature(F.batch_norm).parameters),
    torch.batch_norm: (
        "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn",
    ),
}  # fmt: skip


def _normalized(call: dict[str, Any], site: Site) -> Tensor:
    """The normalizer of `site` in the place of a batch norm with the arguments `call`."""
    weight, bias, eps = call.get("weight"), call.get("bias"), call.get("eps", 1e-5)
    statistics = (call["running_mean"], call["running_var"]) if site.warm_start else None
    if site.norm == "rms" or site.anchor:
        if statistics is not None:
            weight, bias = warm_affine(weight, bias, *statistics, eps, site.num_groups or 1)
        return _anchored(call["input"], site, weight, bias, eps, statistics)
    if torch.is_grad_enabled() and _ends_backward(call["input"]):
        raise RuntimeError("torch's backward of group_norm would end the process")
    if statistics is not None:
        weight, bias = warm_affine(weight, bias, *statistics, eps, site.num_groups or 1)
    return F.group_norm(call["input"], site.num_groups or 1, weight, bias, eps)


def _anchored(
    x: Tensor,
    site: Site,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The normalizer of docs/method.md, "Anchored statistics"; `statistics` are the running ones, if warm."""
    groups = site.num_groups or 1
    mean, var = x.new_zeros(groups, 1), x.new_ones(groups, 1)
    if statistics is not None:
        mu, sigma2 = (values.to(x).view(groups, -1) for values in statistics)
        mean = mu.mean(1, keepdim=True)
        var = (sigma2 + mu**2).mean(1, keepdim=True) - mean**2
    parts = x.reshape(len(x), groups, -1)
    deviation = parts - (mean if site.norm == "rms" else parts.mean(2, keepdim=True))
    mixed = (1 - site.anchor) * (deviation**2).mean(2, keepdim=True) + site.anchor * var
    y = (deviation / (mixed + eps).sqrt()).view(x.shape)
    column = (-1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.view(column)
    return y if bias is None else y + bias.view(column)


def _ends_backward(x: Tensor) -> bool:
    """Whether torch 2.13 dies of a segmentation fault in the backward of a group_norm of `x`, on a CPU."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])
    return last and not x.is_contiguous() and not x.requires_grad


class _Plain(nn.Module):
    """A BatchNorm without running statistics, converted: there is nothing to start from."""

    def __init__(self, norm: _BatchNorm, site: Site) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.site, self.num_groups, self.eps = site, site.num_groups, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        if self.site.norm == "rms" or self.site.anchor:
            return _anchored(x, self.site, self.weight, self.bias, self.eps, None)
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def warm_affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the normalizer, from docs/method.md, "Warm start", written down a second time."""
    dtype = mean.dtype
    mean, sd2 = mean.double(), variance.double() + eps
    g = torch.ones_like(mean) if weight is None else weight.double()
    b = torch.zeros_like(mean) if bias is None else bias.double()
    group = torch.arange(num_groups).repeat_interleave(len(mean) // num_groups)
    of_group = F.one_hot(group, num_groups).double()
    share = of_group / of_group.sum(0)
    center = (mean @ share)[group]
    spread = ((sd2 + mean**2) @ share)[group] - center**2
    factor = g / sd2.sqrt()
    return (factor * spread.sqrt()).to(dtype), (b + factor * (center - mean)).to(dtype)
