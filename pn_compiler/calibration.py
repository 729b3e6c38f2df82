"""Weight and bias of normalizers, from unlabelled samples: the calibrated warm start."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.errors import ConfigError
from pn_compiler.evaluation import Shards, batches_of, each_batch, run, untouched
from pn_compiler.least_squares import ChannelFit, merged
from pn_compiler.tracing import refuse_uninitialised

SWEEPS = 2  # more change nothing that can be measured: docs/calibration.md
LARGE_RESIDUAL = 0.1  # is reported


@dataclasses.dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration found for one normalizer.

    Attributes:
        weight, bias: float64 [C].
        residual: share of the variance of the BatchNorm's output that they do not explain.
    """

    weight: Tensor
    bias: Tensor
    residual: float


def calibrate(
    student: nn.Module,
    teacher: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    *,
    sweeps: int = SWEEPS,
) -> dict[str, Calibrated]:
    """Fits weight and bias of each normalizer to what the BatchNorm at its place computes.

    With n the normalized input of a site (before weight and bias) and t the output of the BatchNorm, over all
    samples and pixels, per channel::

        weight = cov(n, t) / var(n)        bias = mean(t) - weight mean(n)

    The first sweep over the data normalizes the inputs that the BatchNorms have in `teacher`: all sites are
    fitted at once, and exactly wherever a normalizer can be exact. The others normalize what the sites get in
    `student`, as the last sweep left it, so that a site also makes up for errors of those before it.

    Args:
        student: a network with GroupNorms in the place of BatchNorms. It is changed.
        teacher: the BatchNorm network; it runs in eval mode and is as before at the end.
        names: paths of those.
        batches: unlabelled samples, read once in each sweep.
        sweeps: passes over the data.

    Returns:
        The result for each site that the data reaches, by path.

    Raises:
        ConfigError: no batch, values that are nan or infinite, or batches that the networks do not take.
    """
    refuse_uninitialised(teacher)
    batches = batches_of(batches, again=sweeps > 1)
    norms = {name: cast("nn.GroupNorm", student.get_submodule(name)) for name in names}
    found: dict[str, Calibrated] = {}
    with untouched(teacher), untouched(student):
        for number in range(sweeps):
            title = f"calibration {number + 1}/{sweeps}"
            sums = functools.partial(_sums, student, teacher, tuple(norms), first=not number, title=title)
            fits = merged(batches.each(sums)) if isinstance(batches, Shards) else sums(batches)
            for name, fit in fits.items():
                found[name] = _solve(norms[name], fit)
    return found


def _sums(
    student: nn.Module,
    teacher: nn.Module,
    names: tuple[str, ...],
    batches: Iterable[Any],
    *,
    first: bool,
    title: str,
) -> dict[str, ChannelFit]:
    """The sums of one sweep over `batches`, by site. They are additive: shards of the data can be merged."""
    sweep = _Sweep({name: cast("nn.GroupNorm", student.get_submodule(name)) for name in names})
    with untouched(teacher), untouched(student), sweep.hooked(teacher, None if first else student):
        for name, inputs in each_batch(teacher, batches, title):
            run(teacher, inputs, name)
            if not first:
                run(student, inputs, name)
    return sweep.fits


def _solve(norm: nn.GroupNorm, fit: ChannelFit) -> Calibrated:
    """Puts the result of `fit` into `norm`."""
    weight, bias = fit.solve(norm.weight)
    norm.weight.copy_(weight)
    norm.bias.copy_(bias)
    return Calibrated(weight, bias, fit.residual())


class _Sweep:
    """The sums of one pass over the data.

    Memory, beyond the networks: in all sweeps but the first the outputs of all BatchNorms for one batch.
    """

    def __init__(self, norms: Mapping[str, nn.GroupNorm]) -> None:
        self.norms = norms
        self.fits: dict[str, ChannelFit] = {}
        self.targets: dict[str, list[Tensor]] = {name: [] for name in norms}  # one for each call, in order

    @contextlib.contextmanager
    def hooked(self, teacher: nn.Module, student: nn.Module | None) -> Iterator[None]:
        pairs = [(teacher, self._fit_teacher if student is None else self._keep)]
        pairs += [] if student is None else [(student, self._fit_student)]
        handles = [
            model.get_submodule(name).register_forward_hook(functools.partial(hook, name))
            for model, hook in pairs
            for name in self.norms
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _fit_teacher(self, name: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self._add(name, args[0], output)

    def _keep(self, name: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.targets[name].append(output.clone())  # what follows may work in place

    def _fit_student(self, name: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self._add(name, args[0], self.targets[name].pop(0))

    def _add(self, name: str, x: Tensor, target: Tensor) -> None:
        norm = self.norms[name]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        n = F.group_norm(wide, norm.num_groups, None, None, norm.eps)
        if not (n.isfinite().all() and target.isfinite().all()):
            raise ConfigError(f"the calibration data makes values that are nan or infinite at {name}")
        self.fits.setdefault(name, ChannelFit()).add(n, target)
