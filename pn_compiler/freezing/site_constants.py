"""The constant scale and shift that best replace each normalizer, estimated from samples."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pn_compiler.nn import FoldedNorm
from pn_compiler.numerics.affine import channel_affine
from pn_compiler.numerics.least_squares import ChannelFit
from pn_compiler.running.evaluation import run
from pn_compiler.running.inputs import Inputs

Norm = nn.GroupNorm | FoldedNorm  # of a folded network
Norms = Mapping[str, Norm]  # by path
Constants = Mapping[str, tuple[Tensor, Tensor]]  # path of a normalizer -> scale and shift, [C] each

_CONSTANT = 1e-6  # below this variance, relative to its group's, a channel is constant: its slope is unknown


def estimate(network: nn.Module, norms: Norms, batches: Iterable[Inputs], *, frozen: bool) -> Constants:
    """Fits scale and shift of each site to its output by least squares, per channel.

    The output is the one in `network`. So is the input, unless `frozen` is set: then it is the input behind
    sites that already use the constants found so far, so that a site also corrects the errors of earlier
    ones. The constants settle within a few samples: one pass gives nearly what fitting the sites one by one
    would (docs/static.md). All calls of a site are pooled.

    Memory, beyond the network: with `frozen`, the outputs of all sites for one batch.

    Returns:
        The constants of each site that the batches reach, in at least float32, on the device of the site;
        nan where the values are not finite.

    Raises:
        ConfigError: the network does not run on a batch.
    """
    return solved(norms, _sums_behind(network, norms, batches) if frozen else sums(network, norms, batches))


def sums(network: nn.Module, norms: Norms, batches: Iterable[Inputs]) -> dict[str, ChannelFit]:
    """Sums over the inputs and outputs of each site in `network`. Additive: data shards can be merged."""
    fits = {name: ChannelFit() for name in norms}

    def add(name: str, norm: Norm, x: Tensor, output: Tensor) -> None:
        fits[name].add(x, output)

    for inputs in batches:
        with _hooked(norms, add):
            run(network, inputs, "the calibration data")
    return fits


def _sums_behind(network: nn.Module, norms: Norms, batches: Iterable[Inputs]) -> dict[str, ChannelFit]:
    """Sums over each site's input behind the constants found so far, and its output in `network`.

    Not additive: what a batch contributes depends on the batches before it.
    """
    fits = {name: ChannelFit() for name in norms}
    outputs: dict[str, list[Tensor]] = {name: [] for name in norms}  # one for each call, in order

    def keep(name: str, norm: Norm, x: Tensor, output: Tensor) -> None:
        outputs[name].append(output.clone())  # later layers may modify it in place

    def replace(name: str, norm: Norm, x: Tensor, output: Tensor) -> Tensor:
        fits[name].add(x, outputs[name].pop(0))
        return channel_affine(x, *_solve(norm, fits[name]))

    for inputs in batches:
        with _hooked(norms, keep):
            run(network, inputs, "the calibration data")
        with _hooked(norms, replace):
            run(network, inputs, "the calibration data")
    return fits


def solved(norms: Norms, fits: Mapping[str, ChannelFit]) -> Constants:
    """The constants of each site that the data reached."""
    return {name: _solve(norms[name], fit) for name, fit in fits.items() if fit.count}


@contextlib.contextmanager
def replaced(norms: Norms, constants: Constants) -> Iterator[None]:
    """Makes each site in `constants` return x * scale + shift."""

    def replace(name: str, norm: Norm, x: Tensor, output: Tensor) -> Tensor:
        return channel_affine(x, *constants[name])

    with _hooked({name: norms[name] for name in constants}, replace):
        yield


_Hook = Callable[[str, Norm, Tensor, Tensor], Tensor | None]


@contextlib.contextmanager
def _hooked(norms: Norms, hook: _Hook) -> Iterator[None]:
    """Calls ``hook(path, site, input, output)`` after each site; a tensor it returns replaces the output."""

    def call(name: str, norm: Norm, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        return hook(name, norm, args[0], output)

    with contextlib.ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.register_forward_hook(functools.partial(call, name)).remove)
        yield


def _solve(norm: Norm, fit: ChannelFit) -> tuple[Tensor, Tensor]:
    """Scale and shift of `fit`, in at least float32.

    If a channel hardly varies, its slope is noise, and that of a normalizer with the statistics of all
    samples is used: weight / sqrt(V + eps), where V = mean_k(var_k + (mean_k - M)^2) over the channels k of
    the group; for a FoldedNorm likewise.
    """
    var, mean = fit.xx / fit.count, fit.mean_x
    grouped = mean.view(norm.num_groups, -1)
    spread = var.view_as(grouped) + (grouped - grouped.mean(1, keepdim=True)) ** 2
    total = spread.mean(1, keepdim=True).expand_as(grouped).flatten()
    if isinstance(norm, FoldedNorm):
        default = norm.constant_scale(mean, var)
    else:
        weight = torch.ones_like(var) if norm.weight is None else norm.weight.double().cpu()
        default = weight / (total + norm.eps).sqrt()
    scale = torch.where(var < _CONSTANT * total, default, fit.solve(default)[0])
    shift = fit.mean_y - scale * mean
    like = torch.empty(0) if norm.weight is None else norm.weight
    return tuple(
        values.to(like.device, torch.promote_types(like.dtype, torch.float32)) for values in (scale, shift)
    )  # type: ignore[return-value]  # two of them
