"""Weights of a converted network, and an architecture that is not converted yet, on the command line."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pn_compiler.api import transform
from pn_compiler.base.diagnostics import Site
from pn_compiler.base.errors import LoadError, PnCompilerError
from pn_compiler.graph.graph_module import notes, record, sites
from pn_compiler.loading.rebuilding import recorded_options
from pn_compiler.saving.network_file import SavedNetworks
from pn_compiler.saving.plain import is_plain

_KNOWN = frozenset(
    ["norm", "num_groups", "anchor", "proxy", "proxy_padding", "warm_start", "norm_only_bias", "leaves"]
)
_BETWEEN = 0.5  # any anchor but 0 gives a normalizer the buffer, whose value the weights have


class ConvertedNetworks(SavedNetworks):
    """Converts architectures for weights of converted networks, and reads files of `pn_compiler.save`.

    Args:
        given: options of `pn_compiler.transform` that the user has given.
        example: returns the example inputs for a network, as arguments of `transform`.
    """

    def __init__(self, given: Mapping[str, Any], example: Callable[[nn.Module], Mapping[str, Any]]) -> None:
        self.given = {name: value for name, value in given.items() if name in _KNOWN}
        self.example = example

    def architecture(self, model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        recorded = recorded_options(state)
        options = self.given | _implied(state, self.given) if recorded is None else self._agreed(recorded)
        try:
            converted = transform(model, **self.example(model), **options)
        except PnCompilerError as error:
            raise LoadError(
                f"holds weights of a converted network, and the architecture cannot be: {error}"
            ) from error
        found = tuple(_with_anchor(site, state) for site in sites(converted))
        record(converted, found, notes(converted))
        return converted

    def _agreed(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """The options that the weights say they were converted with. Raises LoadError if others are given."""
        if not recorded.keys() <= _KNOWN or not is_plain(dict(recorded)):
            raise LoadError("holds weights of a converted network with strange options")
        for name, value in self.given.items():
            used = recorded.get(name)
            if name != "warm_start" and _frozen(value) != _frozen(used):
                raise LoadError(
                    f"holds weights of a network that was converted with {name}={used!r:.80}, and "
                    f"{value!r:.80} is asked for: leave that out"
                )
        return dict(recorded)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _implied(state: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options that follow from the names of weights which do not record any.

    Raises:
        LoadError: nothing tells how the normalizers group channels.
    """

    def holds(name: str) -> bool:
        return any(str(key).endswith(f".{name}") for key in state)

    options: dict[str, Any] = {}
    cold = given.get("warm_start") == "none"  # which has a norm of its own
    if not (cold or "norm" in given or "num_groups" in given or holds("population_mean")):
        raise LoadError(
            "holds converted weights that do not say how the normalizers group channels (PN306): "
            "give the options of the conversion, such as --norm layer, or save with pn_compiler.save"
        )
    if "proxy" not in given and not holds("proxy_weight"):
        options["proxy"] = False
    if given.get("norm", "rms") != "rms" and "anchor" not in given and holds("population_var"):
        options["anchor"] = _BETWEEN
    return options


def _with_anchor(site: Site, state: Mapping[str, Any]) -> Site:
    """`site` with what the weights say of its population, instead of what the architecture started with."""
    found = {}
    for name in ("anchor", "population_var"):
        inner = f"{site.name}.{name}"
        values = (value for key, value in state.items() if f".{key}".endswith(f".{inner}"))
        found[name] = next(values, None)
    anchor, var = found["anchor"], found["population_var"]
    if not isinstance(anchor, Tensor) or not isinstance(var, Tensor) or not anchor.numel():
        return site
    return dataclasses.replace(site, anchor=float(anchor.float().mean()), warm_start=bool((var != 1).any()))
