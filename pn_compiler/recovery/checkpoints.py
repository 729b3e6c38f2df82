"""BatchNorm checkpoints for networks that are converted already."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from pn_compiler.base.diagnostics import Site
from pn_compiler.base.errors import ConfigError, LoadError
from pn_compiler.graph.graph_module import sites
from pn_compiler.graph.graph_utils import called_module, module_calls
from pn_compiler.graph.ranks import infer_ranks
from pn_compiler.graph.warm_start import affine_from_running_stats, population
from pn_compiler.loading.architectures import state_for
from pn_compiler.nn import INPUT_AFFINE, ProxyNormAct
from pn_compiler.passes.absorption import Router
from pn_compiler.passes.convert.insert_proxy_norm import compensate
from pn_compiler.passes.site_outputs import site_outputs
from pn_compiler.regions.regions import converted_graphs

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def convert_state_dict(
    state_dict: Mapping[str, Any], model: nn.Module, *, key: str | None = None
) -> dict[str, Any]:
    """Converts a BatchNorm checkpoint to a state_dict for `model`, with a warm start.

    For each BatchNorm ``p`` of the original model, ``p.weight`` and ``p.bias`` are computed from all of
    its entries; ``p.running_mean``, ``p.running_var`` and ``p.num_batches_tracked`` are dropped, and
    ``p.proxy_weight`` and ``p.proxy_bias`` start at 0. ``p.population_mean`` and ``p.population_var``, where
    there are any, follow from the running statistics; ``p.anchor`` stays that of `model`. Consumers of a site
    undo its proxy normalization in their weight and bias; the bias may be new. All other entries keep their
    names and values.

    Args:
        state_dict: state_dict of the original model, with running statistics; or a checkpoint that holds one,
            also under names with the prefixes of wrappers, as ``pn-compile --arch`` takes them.
        model: the original model, from this or another checkpoint, converted by `transform` with
            ``warm_start="running_stats"``. It is left untouched.
        key: the entry of a checkpoint that holds the weights, such as "state_dict_ema"; dots lead into nested
            dictionaries, and to a prefix of names. By default averages come first.

    Returns:
        A state_dict for ``model.load_state_dict``.

    Raises:
        ConfigError: entries are missing or do not fit, or `model` was converted to train from scratch.
    """
    if not isinstance(state_dict, Mapping):
        raise ConfigError(
            f"expected a state_dict, got a value of type {type(state_dict).__name__}: give model.state_dict()"
        )
    table = [site for site in sites(model) if site.kind != "skipped"]
    _refuse_cold(table)
    rest = _weights(state_dict, model, table, key)
    model = copy.deepcopy(model)
    for site in table:
        norm = _batch_norm(site, rest, model.get_submodule(site.name))
        new = cast("nn.GroupNorm | ProxyNormAct", model.get_submodule(site.name))
        weight, bias = affine_from_running_stats(norm, new.num_groups)
        new.weight.copy_(weight)
        new.bias.copy_(bias)
        values = dict(
            zip(("population_mean", "population_var"), population(norm, new.num_groups), strict=True)
        )
        for name, buffer in new.named_buffers():
            if name in values:  # an anchor stays as it is
                buffer.copy_(values[name])
        for name, parameter in new.named_parameters():
            if name.startswith("proxy_"):
                parameter.zero_()
    _copy_the_rest(rest, model, {site.name for site in table})
    for graph in converted_graphs(model):
        for consumer, proxy_norm in _consumers(graph):
            compensate(consumer, proxy_norm)
    return dict(model.state_dict())


def _weights(
    checkpoint: Mapping[str, Any], model: nn.Module, table: list[Site], key: str | None
) -> dict[str, Any]:
    """The entries of the original network; those of `checkpoint` as they are if it lacks some."""
    sites_of = {site.name for site in table}
    others = {name for name in model.state_dict() if name.rpartition(".")[0] not in sites_of}
    kept = {name for name in others if not name.endswith("bias")}  # a consumer's bias may be new
    statistics = {f"{name}.{entry}" for name in sites_of for entry in _STATISTICS[:2]}
    try:
        found = state_for(checkpoint, kept | statistics, key)
    except LoadError as error:
        raise ConfigError(f"no state_dict to convert: {error}") from error
    return dict(checkpoint) if found is None else found


def _refuse_cold(table: list[Site]) -> None:
    cold = [site.name for site in table if not site.warm_start]
    if cold:
        raise ConfigError(
            f"{', '.join(cold[:3])}{' ...' if len(cold) > 3 else ''} were converted to train from scratch: "
            "convert the original model with warm_start='running_stats'"
        )


def _batch_norm(site: Site, state: dict[str, Any], new: nn.Module) -> nn.BatchNorm2d:
    """Builds the BatchNorm of `site` from its entries in `state`, and removes them from it."""
    entries = {key: state.pop(f"{site.name}.{key}", None) for key in ("weight", "bias", *_STATISTICS)}
    missing = [f"{site.name}.{key}" for key in _STATISTICS[:2] if entries[key] is None]
    if missing:
        raise ConfigError(f"the state_dict has no {', '.join(missing)}: it is not that of a BatchNorm model")
    channels = cast("Tensor", new.weight).shape[0]
    if entries["running_mean"].shape != (channels,):
        raise ConfigError(
            f"{site.name}.running_mean is {tuple(entries['running_mean'].shape)}, expected ({channels},)"
        )
    affine = entries["weight"] is not None
    norm = nn.BatchNorm2d(channels, float(cast("float", new.eps)), affine=affine, dtype=torch.float64)
    for key in ("running_mean", "running_var", *(("weight", "bias") if affine else ())):
        getattr(norm, key).copy_(entries[key])
    return norm


def _copy_the_rest(rest: dict[str, Any], model: nn.Module, done: set[str]) -> None:
    """Copies the entries that the conversion does not change; a consumer's new bias starts at 0."""
    own = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if name.rpartition(".")[0] not in done
    }
    unknown = sorted(set(rest) - set(own))
    missing = [n for n in sorted(set(own) - set(rest)) if not n.endswith("bias")]
    if unknown or missing:
        raise ConfigError(
            "the state_dict does not fit the model: "
            + "; ".join(
                f"{what} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
                for what, names in (("unknown", unknown), ("missing", missing))
                if names
            )
        )
    for name, value in own.items():
        if name not in rest:
            value.zero_()
        elif value.shape != rest[name].shape:
            raise ConfigError(f"{name} is {tuple(rest[name].shape)}, expected {tuple(value.shape)}")
        else:
            value.copy_(rest[name])


def _consumers(gm: fx.GraphModule) -> Iterator[tuple[nn.Module, ProxyNormAct]]:
    """Yields each linear operator that undoes a site, with that site."""
    infer_ranks(gm)
    router = Router(gm, through_padding=True)
    for path, calls in module_calls(gm).items():
        site = gm.get_submodule(path)
        if not isinstance(site, ProxyNormAct):
            continue
        for call in calls:
            reads = site_outputs(gm, call)
            for shift in reads.get("shift", ()):
                for user in shift.users:
                    consumer = called_module(gm, user)
                    if consumer is not None and type(consumer) in INPUT_AFFINE.values():
                        yield consumer, site
            for z in reads.get("output", ()):
                for absorber in router.route(z, site.num_channels).absorbers:
                    yield gm.get_submodule(str(absorber.target)), site
