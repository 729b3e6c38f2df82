"""Differentially private training with opacus.

opacus computes the gradient of each sample from the input of a module and the gradient of its first output.
A site also hands out a scale and a shift without a batch axis, whose gradients would reach it summed over
the samples. `prepare` lets them travel as [N, C], one row for each sample::

    model = prepare(pn_compiler.transform(network)).train()
    private, optimizer, loader = PrivacyEngine().make_private(module=model, ...)
    ...
    trained = release(private)
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
from opacus.validators.errors import UnsupportedModuleError
from opacus.validators.utils import register_module_validator
from torch import Tensor, nn
from torch.nn.utils._expanded_weights.expanded_weights_impl import ExpandedWeight

from pn_compiler.base.errors import ConfigError
from pn_compiler.inspection.model_checks import check_module
from pn_compiler.nn import INPUT_AFFINE, AnchoredNorm, ChannelAffine, Normalizer, ProxyNormAct
from pn_compiler.numerics.affine import channel_affine

_CONSUMERS = tuple(INPUT_AFFINE.values())
_GRADS = "_opacus_grads"  # of a site: the gradients of its outputs but the first
_SHIFT = "_opacus_shift"  # of a consumer: the shift that it took in, [1, C]
_BUFFERS = "_opacus_buffers"  # of a site: names of its buffers, which are attributes until `release`


def prepare(model: nn.Module) -> nn.Module:
    """Makes `model` ready for ``PrivacyEngine.make_private``, grad_sample_mode "hooks" or "ghost".

    Works in place, by hooks: parameters are the same objects under the same names, so that an optimizer that
    holds them stays valid. Activations that work in place no longer do: opacus does not take them.

    Args:
        model: a result of `pn_compiler.transform`, or any module that holds `pn_compiler.nn.ProxyNormAct`.
            Its outputs stay the same to rounding. Scales and shifts that your own code reads are [N, C].

    Returns:
        `model`.

    Raises:
        ConfigError: `model` is no module, opacus has its hooks on it already, or the activation of a site
            learns.
    """
    check_module(model)
    if isinstance(model, AbstractGradSampleHooks) or hasattr(model, "autograd_grad_sample_hooks"):
        raise ConfigError("opacus already has hooks on this model: call prepare before make_private")
    for module in release(model).modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # a bool, typed for tensors
        if isinstance(module, Normalizer):
            _hide_buffers(module)
        if isinstance(module, ProxyNormAct):
            _check(module, ())
            module.register_forward_pre_hook(_check)
            module.register_forward_pre_hook(_compute_alone)
            module.register_forward_hook(_hand_out_rows)
            module.register_full_backward_hook(_keep_grads)
        elif isinstance(module, AnchoredNorm):
            module.register_forward_pre_hook(_check)
        elif isinstance(module, _CONSUMERS):
            module.register_forward_pre_hook(_check)
            module.register_forward_pre_hook(_take_in_scale)
            module.register_forward_hook(_take_in_shift)
        elif isinstance(module, ChannelAffine):
            module.register_forward_pre_hook(_apply_rows)
        elif isinstance(module, nn.modules.conv._ConvNd):
            module.register_forward_pre_hook(_in_order)
    return model


def release(model: nn.Module | AbstractGradSampleHooks) -> nn.Module:
    """Undoes `prepare` and takes off what opacus added, for `pn_compiler.fold`, `export_onnx` and files.

    Args:
        model: the first result of ``make_private``, or a module that was prepared.

    Returns:
        The module that was given to `prepare`, with its trained parameters.
    """
    if isinstance(model, AbstractGradSampleHooks):
        model.cleanup()
        model = model._module
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks):
            for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
                del hooks[key]
        for name in module.__dict__.pop(_BUFFERS, ()):
            module.register_buffer(name, module.__dict__.pop(name))
        for name in (_GRADS, _SHIFT):
            module.__dict__.pop(name, None)
    return model


def _hide_buffers(site: Normalizer) -> None:
    """Makes attributes of the buffers: opacus refuses any, for those of a BatchNorm gather private data.

    A site's are constants from before the training. Files are written after `release`, which undoes this.
    """
    names = [name for name, buffer in site.named_buffers(recurse=False) if buffer is not None]
    for name in names:
        site.__dict__[name] = site._buffers.pop(name)
    site.__dict__[_BUFFERS] = names


# Hooks ---------------------------------------------------------------------------------------------


def _check(module: nn.Module, _: Any) -> None:
    """Runs before each forward: opacus decides on its mode, and users freeze parameters, after `prepare`."""
    mode = "functorch" if hasattr(module, "ft_compute_sample_grad") else None
    if any(isinstance(p, ExpandedWeight) for p in module._parameters.values()):
        mode = "ew"
    if mode is not None:
        raise ConfigError(
            f"grad_sample_mode={mode!r} cannot train a {type(module).__name__}: use 'hooks' or 'ghost'"
        )
    if isinstance(module, ProxyNormAct) and any(p.requires_grad for p in module.activation.parameters()):
        raise ConfigError(
            f"opacus cannot train a {type(module.activation).__name__} that learns inside of a site: "
            "switch requires_grad of its parameters off"
        )


def _compute_alone(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without what the graph computed of the parameters of all sites: opacus looks at tensors only."""
    return args[:1]


def _hand_out_rows(site: ProxyNormAct, args: tuple[Tensor], outputs: Any) -> Any:
    """scale and shift as [N, C], which takes no memory."""
    if len(site.outputs) == 1:
        return outputs
    rows = len(args[0])
    return tuple(
        value.expand(rows, -1) if name in ("scale", "shift") and value is not None else value
        for name, value in zip(site.outputs, outputs, strict=True)
    )


def _keep_grads(site: nn.Module, _: Any, grad_outputs: tuple[Tensor | None, ...]) -> None:
    """Runs right before opacus' own hook, which sees the first gradient only."""
    setattr(site, _GRADS, grad_outputs[1:])


def _take_in_scale(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
    x, scale, shift = (*args, None, None)[:3]
    setattr(module, _SHIFT, shift)
    return (_affine(x, scale, None),)


def _take_in_shift(module: Any, _: Any, output: Tensor) -> Tensor:
    """Adds to each output channel the constant that the shift makes of it, [N, O]."""
    shift = getattr(module, _SHIFT)
    if shift is None:
        return output
    setattr(module, _SHIFT, shift[:1].detach())  # every row is the same
    groups, (rows, channels) = getattr(module, "groups", 1), shift.shape
    kernel = module.weight.reshape(groups, len(module.weight) // groups, channels // groups, -1).sum(3)
    extra = torch.einsum("goi,ngi->ngo", kernel, shift.reshape(rows, groups, channels // groups).to(kernel))
    return output.add_(extra.reshape(*output.shape[:2], *[1] * (output.dim() - 2)))


def _apply_rows(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, scale, shift, *gate = args
    return _affine(x, scale, shift), None, None, *gate


def _in_order(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Opacus reads the input of a convolution as if it were contiguous, which channels_last is not."""
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)


_HOOKS = (
    _in_order,
    _check,
    _compute_alone,
    _hand_out_rows,
    _keep_grads,
    _take_in_scale,
    _take_in_shift,
    _apply_rows,
)


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x * scale + shift, both [N, C] or None: the channels of N samples are N * C channels of one."""
    if scale is None and shift is None:
        return x
    merged = [None if rows is None else rows.flatten() for rows in (scale, shift)]
    return channel_affine(x.flatten(0, 1).unsqueeze(0), *merged).reshape(x.shape)


# What opacus calls ---------------------------------------------------------------------------------


@register_module_validator(ProxyNormAct)  # type: ignore[untyped-decorator]  # opacus has no types
def _errors(site: ProxyNormAct) -> list[UnsupportedModuleError]:
    if _hand_out_rows in site._forward_hooks.values():
        return []
    return [UnsupportedModuleError("call pn_compiler.integrations.opacus.prepare(model) before make_private")]


@register_grad_sampler(ProxyNormAct)  # type: ignore[untyped-decorator]  # as above
def _sample_site(
    site: ProxyNormAct, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """The gradient of each parameter for each sample, [N, *parameter]."""
    parameters = [p for p in site.parameters() if p.requires_grad]
    x = activations[0].to(torch.promote_types(activations[0].dtype, site.weight.dtype))
    if not len(x):
        return {p: p.new_zeros(0, *p.shape) for p in parameters}
    with torch.enable_grad():
        affine = site.compute_affine()
    samples = _sample_affine(site, x, affine, _all_grads(site, backprops))
    # on to the parameters that weight, bias, scale and shift are functions of
    given = zip((value for value in affine if value is not None), samples, strict=True)
    learning = [(value, grad) for value, grad in given if value.requires_grad]
    values, grads = ([pair[at] for pair in learning] for at in (0, 1))
    found = torch.autograd.grad(values, parameters, grads, is_grads_batched=True)
    return dict(zip(parameters, found, strict=True))


def _all_grads(site: Any, backprops: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of each output. opacus has undone the mean of the loss in `backprops`, the first, only."""
    if len(site.outputs) == 1:
        return (backprops,)
    (reduction,) = {
        hook.keywords["loss_reduction"]
        for hook in site._backward_hooks.values()
        if isinstance(hook, functools.partial)
    }
    factor = site.max_batch_len if reduction == "mean" else 1
    others = site.__dict__.pop(_GRADS)
    return (backprops, *(None if grad is None else grad * factor for grad in others))


def _sample_affine(
    site: ProxyNormAct, x: Tensor, values: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """Gradients of weight, bias, scale if there is one, and shift, each [N, C]."""
    with torch.enable_grad():
        weight, bias, *pair = (None if value is None else value.detach() for value in values)
        affine = site.normalize(x, weight, bias)
        scale, shift = (None if value is None else value.expand(len(x), -1) for value in pair)
        leaves = [leaf.requires_grad_() for leaf in (affine, scale, shift) if leaf is not None]
        activation = site.activation(affine)
        outputs = {"activation": activation, "scale": scale, "shift": shift, "affine": affine}
        if "output" in site.outputs:
            outputs["output"] = _affine(activation, scale, shift)
        given = [(outputs[name], g) for name, g in zip(site.outputs, grads, strict=True) if g is not None]
        found = torch.autograd.grad(
            [output for output, _ in given], leaves, [grad for _, grad in given], materialize_grads=True
        )
    by_affine, *others = found
    normalized = site.normalize(x)
    by_weight = torch.einsum("nc...,nc...->nc", by_affine, normalized)
    return by_weight, torch.einsum("nc...->nc", by_affine), *others


@register_grad_sampler(AnchoredNorm)  # type: ignore[untyped-decorator]  # as above
def _sample_normalizer(
    site: AnchoredNorm, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    x = activations[0].to(torch.promote_types(activations[0].dtype, site.weight.dtype))
    samples: dict[nn.Parameter, Tensor] = {}
    if site.weight.requires_grad:
        samples[site.weight] = torch.einsum("nc...,nc...->nc", backprops, site.normalize(x))
    if site.bias.requires_grad:
        samples[site.bias] = torch.einsum("nc...->nc", backprops)
    return samples


@register_grad_sampler(_CONSUMERS)  # type: ignore[untyped-decorator]  # as above
def _sample_consumer(module: Any, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradients of the linear operator on padded x * scale + shift, for each sample."""
    x, grads = (value.to(module.weight.dtype) for value in (activations[0], backprops))
    samples: dict[nn.Parameter, Tensor] = {}
    if module.weight.requires_grad:
        convolves = isinstance(module, nn.modules.conv._ConvNd)
        if convolves:
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode)
        shift = getattr(module, _SHIFT)
        if shift is not None:
            x = _affine(x, None, shift.expand(len(x), -1))
        samples[module.weight] = (
            _sample_kernel(module, x, grads) if convolves else torch.einsum("no,ni->noi", grads, x)
        )
    if module.bias is not None and module.bias.requires_grad:
        samples[module.bias] = torch.einsum("no...->no", grads)
    return samples


def _sample_kernel(conv: nn.modules.conv._ConvNd, x: Tensor, grads: Tensor) -> Tensor:
    """Gradients of a kernel, [N, O, I / groups, *kernel], from those of the output; `x` is padded already."""
    rank, groups = len(conv.kernel_size), len(x) * conv.groups  # a sample is a group of its own
    for axis, (size, dilation) in enumerate(zip(conv.kernel_size, conv.dilation, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * dilation + 1, conv.stride[axis])[..., ::dilation]
    pixels = math.prod(grads.shape[2:])
    windows = x.permute(0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))  # [N, I, *kernel, *pixels]
    columns = windows.reshape(groups, math.prod(conv.weight.shape[1:]), pixels)
    rows = grads.reshape(groups, conv.out_channels // conv.groups, pixels)
    return torch.bmm(rows, columns.mT).view(len(x), *conv.weight.shape)
