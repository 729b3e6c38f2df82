"""Modules of a converted network.

`ProxyNormAct` is a site: normalizer + activation + proxy normalization; `ProxyStatistics` computes the part
of many sites that depends only on parameters. The layers that absorb their scale and shift are in
`pn_compiler.nn.consumers`. All are leaves for torch.fx, so a converted graph holds only modules and can be
pickled.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.nn.normalizers import AnchoredNorm, Normalizer, Statistics
from pn_compiler.numerics.affine import channel_affine
from pn_compiler.numerics.memo import Memo
from pn_compiler.numerics.proxy_statistics import PARAMETERS, SiteAffine, scale_and_shift, site_affine
from pn_compiler.operators.activations import is_homogeneous, run_in_place

Output = Literal["output", "activation", "scale", "shift", "affine"]


class ProxyNormAct(Normalizer):
    """A normalizer, an activation and proxy normalization of the activation.

    With y = normalizer(x) and phi the activation, per channel c::

        z_c = (phi(weight_c * y_c + bias_c) - mean_c) / sqrt(var_c + proxy_eps)

    where mean_c and var_c are the moments of phi(weight_c * p + bias_c) under the proxy
    distribution p ~ Normal(proxy_bias_c, (1 + proxy_weight_c)^2). They depend only on parameters.

    Args:
        num_groups: groups of the normalizer: 1 is LayerNorm over [C, *], C is InstanceNorm.
        num_channels: C.
        activation: an elementwise module; `pn_compiler.proxy_moments` says which are exact.
        eps: added to the variance of the normalizer.
        proxy_eps: added to the variance of the activation under the proxy distribution.
        outputs: what forward returns: a tensor for a single name, else a tuple in this order.
            "output" is z. The others let the consumers absorb the affine z = activation * scale +
            shift: "activation" is phi(...), already scaled if a positive scale commutes with phi
            (then "scale" is None); "scale" and "shift" have shape [C]; "affine" is weight * y + bias.
        statistics: of the normalizer: see `Normalizer`, also for buffers.
        device: of the parameters.
        dtype: of the parameters.

    Parameters: ``weight``, ``bias``, ``proxy_weight``, ``proxy_bias``, each [C].

    Shape: x is [N, C, *]; "output", "activation" and "affine" have the same shape.

    Source: Labatie et al., NeurIPS 2021 (arXiv 2106.03743), section 5.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        activation: nn.Module,
        eps: float = 1e-5,
        proxy_eps: float = 0.03,
        *,
        outputs: tuple[Output, ...] = ("output",),
        statistics: Statistics = "group",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, statistics=statistics, device=device, dtype=dtype)
        unknown = set(outputs) - set(get_args(Output))
        if unknown or not outputs:
            raise ConfigError(f"outputs={outputs!r}: expected names out of {get_args(Output)}")
        self.proxy_eps = proxy_eps
        self.outputs: tuple[Output, ...] = outputs
        self.activation = activation
        self.proxy_weight = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))
        self.proxy_bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))
        self._memo = Memo()

    def reset_parameters(self) -> None:
        """Sets weight to 1, bias to 0, and the proxy distribution to standard normal."""
        super().reset_parameters()
        for parameter in (self.proxy_weight, self.proxy_bias):
            nn.init.zeros_(parameter)

    def scale_and_shift(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(r, v) with z = activation * r + v: r = 1/sqrt(var + proxy_eps), v = -mean * r.

        Each has shape [C], in `dtype`, or by default in at least float32 whatever the parameters' dtype.
        """
        dtype = dtype or torch.promote_types(self.weight.dtype, torch.float32)
        scale, shift = scale_and_shift(self._stacked(), self.activation, self.proxy_eps)
        return scale.to(dtype), shift.to(dtype)

    def _stacked(self) -> Tensor:
        return torch.stack([getattr(self, name) for name in PARAMETERS])

    def compute_affine(self, given: tuple["Recipe", SiteAffine] | None = None) -> SiteAffine:
        """The affine that `forward` applies: from `given`, or computed here, memoized in eval mode."""
        if given is not None and self._fits(*given):
            affine = given[1]
        else:
            parameters, recipe = self._stacked(), self.recipe
            affine = self._memo.recall(
                (recipe, parameters, *self.activation.parameters()),
                lambda: site_affine(
                    parameters, self.activation, recipe.proxy_eps, into_affine=recipe.into_affine
                ),
            )
        return affine if affine.weight is not None else affine._replace(weight=self.weight, bias=self.bias)

    @property
    def scales_affine(self) -> bool:
        """Whether weight and bias absorb r: phi(r u) = r phi(u), and u itself is not an output."""
        return is_homogeneous(self.activation) and "affine" not in self.outputs

    @property
    def recipe(self) -> "Recipe":
        activation = self.activation
        return Recipe(type(activation), activation.extra_repr(), self.proxy_eps, self.scales_affine)

    def forward(self, x: Tensor, given: tuple["Recipe", SiteAffine] | None = None) -> Any:
        """Runs the site; `given` is what `ProxyStatistics` computed for it, and the recipe it used."""
        weight, bias, scale, shift = self.compute_affine(given)
        affine = self.normalize(x, weight, bias)
        shared = "affine" in self.outputs
        if shared or has_hooks(self.activation):
            in_place = shared and getattr(self.activation, "inplace", False)
            activation = self.activation(affine.clone() if in_place else affine)
        else:
            activation = run_in_place(self.activation, affine)
        values = {"activation": activation, "scale": scale, "shift": shift, "affine": affine}
        if "output" in self.outputs:
            values["output"] = channel_affine(activation, scale, shift)
        results = tuple(values[name] for name in self.outputs)
        return results[0] if len(results) == 1 else results

    def _fits(self, recipe: "Recipe", affine: SiteAffine) -> bool:
        """False if the site has changed since, or its parameters were gathered after the statistics."""
        return recipe == self.recipe and affine.shift.device == self.weight.device

    def extra_repr(self) -> str:
        text = f"{self.num_groups}, {self.num_channels}, eps={self.eps}, proxy_eps={self.proxy_eps}"
        text += self._describe()
        return text if self.outputs == ("output",) else f"{text}, outputs={self.outputs}"


class _Followed(nn.Module):
    """A normalizer followed by other modules, for code that calls BatchNorm and activation as one module."""

    following: tuple[str, ...]

    def forward(self, *args: Any) -> Any:
        result = super().forward(*args)  # that of the normalizer
        for name in self.following:
            result = getattr(self, name)(result)
        return result


class FollowedGroupNorm(_Followed, nn.GroupNorm):
    """A GroupNorm and the modules named in `following`, its children, in this order."""


class FollowedAnchoredNorm(_Followed, AnchoredNorm):
    """An AnchoredNorm and the modules named in `following`, its children, in this order."""


class FollowedProxyNormAct(_Followed, ProxyNormAct):
    """A ProxyNormAct and the modules named in `following`, its children, in this order."""


def put_behind(norm: nn.Module, following: dict[str, nn.Module]) -> None:
    """Makes `norm`, a site, apply these modules to its result."""
    for name, module in following.items():
        norm.add_module(name, module)
    norm.following = tuple(following)  # type: ignore[assignment]
    kinds = {ProxyNormAct: FollowedProxyNormAct, AnchoredNorm: FollowedAnchoredNorm}
    norm.__class__ = kinds.get(type(norm), FollowedGroupNorm)


class _Functional(nn.Module):
    """A normalizer in the place of a BatchNorm that code calls as ``F.batch_norm(x, bn.running_mean, ...)``.

    Its running statistics are not tensors: batch_norm, given them, returns the result of this module.

    Attributes:
        momentum: that of the BatchNorm, which such code may pass on.
    """

    momentum: float | None

    @property
    def running_mean(self) -> "_Statistic":
        return _Statistic(self)

    @property
    def running_var(self) -> "_Statistic":
        return _Statistic(self)


class FunctionalGroupNorm(_Functional, nn.GroupNorm):
    """A GroupNorm that answers ``F.batch_norm(x, norm.running_mean, norm.running_var, ...)``."""


class FunctionalAnchoredNorm(_Functional, AnchoredNorm):
    """An AnchoredNorm that answers ``F.batch_norm(x, norm.running_mean, norm.running_var, ...)``."""


def answer_batch_norm(norm: nn.Module, momentum: float | None) -> None:
    """Makes `norm`, a site without an activation, answer calls of batch_norm with its running statistics."""
    norm.__class__ = FunctionalAnchoredNorm if isinstance(norm, AnchoredNorm) else FunctionalGroupNorm
    norm.momentum = momentum  # type: ignore[assignment]


class _Statistic:
    """Stands for the running statistics of a BatchNorm that `norm` has replaced."""

    def __init__(self, norm: _Functional) -> None:
        self._norm = norm

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        norms = {arg._norm for arg in (*args, *kwargs.values()) if isinstance(arg, cls)}
        if function not in (F.batch_norm, torch.batch_norm) or len(norms) != 1:
            name = getattr(function, "__name__", function)
            raise TypeError(
                f"{name} got running statistics of a converted BatchNorm: only batch_norm takes them"
            )
        return norms.pop()(args[0] if args else kwargs["input"])


class Recipe(NamedTuple):
    """What the statistics of a site depend on besides its parameters."""

    activation: type[nn.Module]
    options: str  # of the activation
    proxy_eps: float
    into_affine: bool


class SiteGroup(NamedTuple):
    """Sites that `ProxyStatistics` computes together, and the channels of each."""

    recipe: Recipe
    activation: nn.Module
    sizes: tuple[int, ...]


class ProxyStatistics(nn.Module):
    """Computes the proxy statistics of all sites of a graph at once, instead of each site its own.

    It has no parameters of its own: the graph passes it those of the sites, and passes each site its result.

    Args:
        groups: the sites to compute together. The order of the sites is that of the groups.

    Attributes:
        enabled: if false, the sites get None and compute their own statistics.

    Shape: for each group weight of every site, then bias, proxy_weight and proxy_bias of every site, all [C].
    """

    def __init__(self, groups: Sequence[SiteGroup]) -> None:
        super().__init__()
        self.recipes, activations, self.sizes = zip(*groups, strict=True)
        self.activations = nn.ModuleList(activations)
        self.enabled = True
        self._memo = Memo()

    def forward(self, *parameters: Tensor) -> tuple[tuple[Recipe, SiteAffine] | None, ...]:
        if not (self.enabled and _in_one_place(parameters)):
            return (None,) * sum(map(len, self.sizes))
        rest = iter(parameters)
        stacks = [torch.cat(list(itertools.islice(rest, 4 * len(sizes)))).view(4, -1) for sizes in self.sizes]
        return self._memo.recall(stacks, lambda: self._compute(stacks))

    def _compute(self, stacks: list[Tensor]) -> tuple[tuple[Recipe, SiteAffine], ...]:
        results: list[tuple[Recipe, SiteAffine]] = []
        for recipe, activation, sizes, parameters in zip(
            self.recipes, self.activations, self.sizes, stacks, strict=True
        ):
            affine = site_affine(parameters, activation, recipe.proxy_eps, into_affine=recipe.into_affine)
            parts = zip(*(_split(field, sizes) for field in affine), strict=True)
            results += [(recipe, SiteAffine(*fields)) for fields in parts]
        return tuple(results)


def _in_one_place(parameters: Sequence[Tensor]) -> bool:
    """Whether the parameters can be stacked: not sharded, on one device, and not gathered later."""
    plain = all(type(p) in (Tensor, nn.Parameter) for p in parameters)
    return plain and len({p.device for p in parameters}) == 1


def _split(field: Tensor | None, sizes: tuple[int, ...]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if field is None else torch.split(field, list(sizes))
