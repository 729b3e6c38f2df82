"""Scale and shift that do best in the place of normalizers, from samples."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pn_compiler.numerics.affine import channel_affine
from pn_compiler.numerics.least_squares import ChannelFit
from pn_compiler.running.evaluation import run
from pn_compiler.running.inputs import Inputs

Norms = Mapping[str, nn.GroupNorm]  # by path
Constants = Mapping[str, tuple[Tensor, Tensor]]  # path of a normalizer -> scale and shift, [C] each

_CONSTANT = 1e-6  # variance of a channel, relative to that of its group, below which its slope is unknown


def estimate(network: nn.Module, norms: Norms, batches: Iterable[Inputs], *, frozen: bool) -> Constants:
    """Scale and shift of each site, by least squares of its output on its input, per channel.

    The output is that in `network`. The input is, too, or with `frozen` the one behind sites that have the
    constants found so far: a site then also makes up for errors of those before it. Constants settle within
    some samples, so that one pass gives nearly what fitting one site after the other would (docs/static.md).
    Several calls of a site count together.

    Memory, beyond the network: with `frozen` the outputs of all sites for one batch.

    Returns:
        The constants of each site that the batches reach, in float32 or wider on the device of the site;
        nan where the values are not finite.

    Raises:
        ConfigError: the network does not run on a batch.
    """
    return solved(norms, _sums_behind(network, norms, batches) if frozen else sums(network, norms, batches))


def sums(network: nn.Module, norms: Norms, batches: Iterable[Inputs]) -> dict[str, ChannelFit]:
    """What each site gets and gives in `network`. It is additive: shards of the data can be merged."""
    fits = {name: ChannelFit() for name in norms}

    def add(name: str, norm: nn.GroupNorm, x: Tensor, output: Tensor) -> None:
        fits[name].add(x, output)

    for inputs in batches:
        with _hooked(norms, add):
            run(network, inputs, "the calibration data")
    return fits


def _sums_behind(network: nn.Module, norms: Norms, batches: Iterable[Inputs]) -> dict[str, ChannelFit]:
    """What each site gets behind the constants found so far, and gives in `network`.

    Not additive: what a batch adds depends on the batches before it.
    """
    fits = {name: ChannelFit() for name in norms}
    outputs: dict[str, list[Tensor]] = {name: [] for name in norms}  # one for each call, in order

    def keep(name: str, norm: nn.GroupNorm, x: Tensor, output: Tensor) -> None:
        outputs[name].append(output.clone())  # what follows may work in place

    def replace(name: str, norm: nn.GroupNorm, x: Tensor, output: Tensor) -> Tensor:
        fits[name].add(x, outputs[name].pop(0))
        return channel_affine(x, *_solve(norm, fits[name]))

    for inputs in batches:
        with _hooked(norms, keep):
            run(network, inputs, "the calibration data")
        with _hooked(norms, replace):
            run(network, inputs, "the calibration data")
    return fits


def solved(norms: Norms, fits: Mapping[str, ChannelFit]) -> Constants:
    """The constants of each site that data reached."""
    return {name: _solve(norms[name], fit) for name, fit in fits.items() if fit.count}


@contextlib.contextmanager
def replaced(norms: Norms, constants: Constants) -> Iterator[None]:
    """The sites that have constants give x * scale + shift."""

    def replace(name: str, norm: nn.GroupNorm, x: Tensor, output: Tensor) -> Tensor:
        return channel_affine(x, *constants[name])

    with _hooked({name: norms[name] for name in constants}, replace):
        yield


_Hook = Callable[[str, nn.GroupNorm, Tensor, Tensor], Tensor | None]


@contextlib.contextmanager
def _hooked(norms: Norms, hook: _Hook) -> Iterator[None]:
    """Calls ``hook(path, site, input, output)`` behind each site; a tensor that it returns is the output."""

    def call(name: str, norm: nn.GroupNorm, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        return hook(name, norm, args[0], output)

    with contextlib.ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.register_forward_hook(functools.partial(call, name)).remove)
        yield


def _solve(norm: nn.GroupNorm, fit: ChannelFit) -> tuple[Tensor, Tensor]:
    """Scale and shift of `fit`, in float32 or wider.

    Where a channel hardly varies its slope is noise: it gets that of a normalizer with the statistics of all
    samples, weight / sqrt(V + eps). Over the channels k of the group, V = mean_k(var_k + (mean_k - M)^2).
    """
    var, mean = fit.xx / fit.count, fit.mean_x
    grouped = mean.view(norm.num_groups, -1)
    spread = var.view_as(grouped) + (grouped - grouped.mean(1, keepdim=True)) ** 2
    total = spread.mean(1, keepdim=True).expand_as(grouped).flatten()
    weight = torch.ones_like(var) if norm.weight is None else norm.weight.double().cpu()
    default = weight / (total + norm.eps).sqrt()
    scale = torch.where(var < _CONSTANT * total, default, fit.solve(default)[0])
    shift = fit.mean_y - scale * mean
    like = torch.empty(0) if norm.weight is None else norm.weight
    return tuple(
        values.to(like.device, torch.promote_types(like.dtype, torch.float32)) for values in (scale, shift)
    )  # type: ignore[return-value]  # two of them
