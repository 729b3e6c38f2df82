"""Parameter groups for an optimizer, each with its weight decay."""

import fnmatch
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import check_number
from pn_compiler.nn import ProxyNormAct
from pn_compiler.running.copying import unwrap

_PROXY = {"proxy_weight", "proxy_bias"}
_NORMALIZERS = (nn.LayerNorm, nn.RMSNorm)  # those whose weight may have more than one axis


def param_groups(
    model: nn.Module,
    weight_decay: float,
    proxy_weight_decay: float | None = None,
    *,
    no_weight_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters of `model`, grouped by their weight decay.

    - "no_decay": weight and bias of normalizers, every other parameter with at most one axis, and every
      bias: weight decay 0, as in `timm.optim.param_groups_weight_decay`;
    - "proxy": ``proxy_weight`` and ``proxy_bias`` of each `pn_compiler.nn.ProxyNormAct`:
      `proxy_weight_decay`;
    - "decay": all others, the kernels: `weight_decay`.

    The paper asks for a strict L2 penalty on the proxy parameters: the gradient of
    d/2 * (|proxy_weight|^2 + |proxy_bias|^2) is added to that of the loss. It keeps the proxy
    distribution near Normal(0, 1), and it is what ``torch.optim.SGD`` does with `proxy_weight_decay` = d.
    ``AdamW`` decouples it: every step shrinks a parameter by lr * d, whatever the gradient is. ``Adam``
    and ``RMSprop`` rescale it together with the gradient. With these optimizers, add the strict penalty to
    your loss and set `proxy_weight_decay` to 0.

    Args:
        model: a result of `pn_compiler.transform`, or any other module; it may be wrapped or part of a larger
            one: DistributedDataParallel, fully_shard, torch.compile, opacus, Lightning.
        weight_decay: weight decay of the kernels.
        proxy_weight_decay: weight decay of the proxy parameters. None means `weight_decay`, as in the
            reference implementation.
        no_weight_decay: names of further parameters without decay, with wildcards as in `fnmatch`. Names
            returned by a module's ``no_weight_decay()`` method, as in timm, are added; a converted network
            has that method, too.

    Returns:
        ``[{"params": [...], "weight_decay": x, "name": "no_decay"}, ...]`` for any torch optimizer, without
        empty groups. Each trainable parameter is in exactly one group; a shared one is listed once.

    Raises:
        ConfigError: a weight decay is negative or not finite.

    Source: Labatie et al., NeurIPS 2021 (arXiv 2106.03743), and its public reference implementation.
    """
    decays = {
        "no_decay": 0.0,
        "decay": weight_decay,
        "proxy": weight_decay if proxy_weight_decay is None else proxy_weight_decay,
    }
    check_number("weight_decay of 'decay' parameters", decays["decay"], "0 or more", 0)
    check_number("proxy_weight_decay of 'proxy' parameters", decays["proxy"], "0 or more", 0)
    if isinstance(no_weight_decay, str) or not isinstance(no_weight_decay, Collection):
        raise ConfigError(f"no_weight_decay={no_weight_decay!r:.80}: expected a list of names")
    model = unwrap(model)
    proxy, normalizers = set(_proxy_parameters(model)), set(_normalizer_parameters(model))
    patterns = {*no_weight_decay, *_listed_by_modules(model)}

    def group_of(name: str, parameter: nn.Parameter) -> str:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return "no_decay"
        if parameter in proxy:
            return "proxy"
        flat = parameter.ndim <= 1 or name.endswith(".bias") or parameter in normalizers
        return "no_decay" if flat else "decay"

    groups: dict[str, list[nn.Parameter]] = {group: [] for group in decays}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[group_of(name, parameter)].append(parameter)
    return [
        {"params": parameters, "weight_decay": decays[group], "name": group}
        for group, parameters in groups.items()
        if parameters
    ]


def _proxy_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, ProxyNormAct):
            for name, parameter in module.named_parameters():
                if _PROXY.intersection(name.split(".")):  # parametrizations.proxy_weight.original, too
                    yield parameter


def _normalizer_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, _NORMALIZERS):
            yield from module.parameters()


def _listed_by_modules(model: nn.Module) -> Iterator[str]:
    """Full names of the parameters that timm's ``no_weight_decay()`` lists, over all modules."""
    for path, module in model.named_modules():
        method = getattr(module, "no_weight_decay", None)
        if callable(method):
            yield from (f"{path}.{name}" if path else name for name in method())
