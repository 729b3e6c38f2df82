"""Weight and bias of normalizers, from unlabelled samples: the calibrated warm start."""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.errors import ConfigError
from pn_compiler.evaluation import batches_of, each_batch, untouched
from pn_compiler.least_squares import ChannelFit
from pn_compiler.output_error import Batches, Norms, OutputError, observed, owner, put, values_of
from pn_compiler.tracing import refuse_uninitialised

EVALUATIONS = 12  # of the error and its gradient; more gain little: docs/calibration.md
LARGE_RESIDUAL = 0.1  # is reported


@dataclasses.dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration found for one normalizer.

    Attributes:
        weight, bias: float64 [C].
        residual: mean square of what they leave of the BatchNorm's output, relative to its variance.
    """

    weight: Tensor
    bias: Tensor
    residual: float


@torch.inference_mode(False)  # whatever the caller's mode: there are gradients
def calibrate(
    student: nn.Module,
    teacher: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    *,
    evaluations: int = EVALUATIONS,
) -> dict[str, Calibrated]:
    """Fits weight and bias of all normalizers together, to the outputs of the BatchNorm network.

    What is minimized is |s - t|^2 / |t|^2 over all samples, with s the outputs of `student` and t those of
    `teacher`; see `OutputError`. The descent (L-BFGS) begins at the better of two points: weight and bias
    as they are, and for each site alone, per channel, the least squares of the BatchNorm's output on the
    normalized input n that the site has in `teacher`::

        weight = cov(n, t) / var(n)        bias = mean(t) - weight mean(n)

    These are exact wherever a normalizer can be, but add up to more than they must where it cannot.

    Args:
        student: a network with GroupNorms in the place of BatchNorms. It is changed.
        teacher: the BatchNorm network; it runs in eval mode. Values in half precision become float32.
        names: paths of those.
        batches: unlabelled samples, read once for the least squares, for each evaluation and at the end.
            Random numbers of torch are the same each time.
        evaluations: of the error and its gradient.

    Returns:
        The result for each site that the data reaches, by path.

    Raises:
        ConfigError: no batch, values that are nan or infinite, or batches that the networks do not take.
    """
    refuse_uninitialised(teacher)
    batches = batches_of(batches, again=True)
    _widen(student)
    _widen(teacher)
    with untouched(teacher), untouched(student):
        student.requires_grad_(requires_grad=False)
        sites = {name: cast("nn.GroupNorm", student.get_submodule(name)) for name in names}
        fits, powers = _survey(teacher, sites, _read(teacher, batches, "calibration: sites"))
        norms = {name: norm for name, norm in sites.items() if name in fits}
        error = OutputError(student, teacher, norms, powers)

        def evaluate(values: Tensor) -> tuple[float, Tensor]:
            put(norms, values)
            return error(_read(teacher, batches, "calibration: outputs"))

        starts = [values_of(norms), _solutions(norms, fits)]
        put(norms, _descend(evaluate, starts, _scale(norms), evaluations))
        residuals = _residuals(student, teacher, norms, _read(teacher, batches, "calibration: residuals"))
    return {
        name: Calibrated(norm.weight.double().cpu(), norm.bias.double().cpu(), residuals[name])
        for name, norm in norms.items()
    }


def _widen(model: nn.Module) -> None:
    """Half precision is too coarse for gradients."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.float()


def _read(model: nn.Module, batches: Iterable[Any], title: str) -> Batches:
    """All batches, drawn with the same random numbers each time."""
    torch.manual_seed(0)
    for name, inputs in each_batch(model, batches, title):
        yield name, inputs.map(lambda x: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)


def _survey(
    teacher: nn.Module, sites: Norms, batches: Batches
) -> tuple[dict[str, ChannelFit], dict[str, float]]:
    """(least squares of each site that is reached, sum of squares of each output and site)."""
    fits: dict[str, ChannelFit] = {}
    powers: dict[str, float] = collections.defaultdict(float)

    def add(name: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        norm = sites[name]
        n = F.group_norm(args[0], norm.num_groups, None, None, norm.eps)
        if not (n.isfinite().all() and output.isfinite().all()):
            raise ConfigError(f"the calibration data makes values that are nan or infinite at {name}")
        fits.setdefault(name, ChannelFit()).add(n, output)
        powers[name] += _power(output)

    with contextlib.ExitStack() as stack:
        for name in sites:
            hook = teacher.get_submodule(name).register_forward_hook(functools.partial(add, name))
            stack.callback(hook.remove)
        for name, inputs in batches:
            for place, output in observed(teacher, (), inputs, name).items():
                if not output.isfinite().all():
                    raise ConfigError(f"{name} makes values that are nan or infinite at {place}")
                powers[place] += _power(output)
    return fits, powers


def _power(x: Tensor) -> float:
    return float(x.detach().double().square().sum())


def _solutions(norms: Norms, fits: Mapping[str, ChannelFit]) -> Tensor:
    """The least squares of each site, as `values_of` has them."""
    return torch.cat([part for name, norm in norms.items() for part in fits[name].solve(norm.weight)])


def _scale(norms: Norms) -> Tensor:
    """The size of each weight, for its bias, too, as `values_of` has them."""
    sizes = [norm.weight.detach().double().cpu().abs() for norm in norms.values()]
    return torch.cat([part for size in sizes for part in (size, size)])


def _descend(
    evaluate: Callable[[Tensor], tuple[float, Tensor]],
    starts: Sequence[Tensor],
    scale: Tensor,
    evaluations: int,
) -> Tensor:
    """The values of least error that L-BFGS comes by, beginning at the better one of `starts`.

    Args:
        evaluate: error and gradient at some values.
        starts: two points, of which one may be out of range.
        scale: of a change of each value.
        evaluations: how many it takes, besides those of `starts`.

    Source: Nocedal & Wright, "Numerical Optimization", 2nd ed., section 7.2; strong Wolfe conditions: 3.5.
    """
    known = [(values, *evaluate(values)) for values in starts]
    start, least, slope = min(known, key=lambda point: point[1] if math.isfinite(point[1]) else math.inf)
    best, ceiling = start, 10 * least
    ready = [(least, slope)]  # what is known already
    change = torch.zeros_like(start, requires_grad=True)

    def closure() -> float:
        nonlocal best, least
        values = start + scale * change.detach()
        error, gradient = ready.pop() if ready else evaluate(values)
        if not math.isfinite(error):
            error, gradient = ceiling, torch.zeros_like(values)
        if error < least:
            best, least = values, error
        change.grad = gradient * scale
        return error

    torch.optim.LBFGS(
        [change], max_iter=evaluations, max_eval=evaluations + 1, line_search_fn="strong_wolfe"
    ).step(closure)  # type: ignore[no-untyped-call]
    return best


def _residuals(student: nn.Module, teacher: nn.Module, norms: Norms, batches: Batches) -> dict[str, float]:
    """Mean square difference of each site to its BatchNorm, relative to the variance of that."""
    fits: dict[str, ChannelFit] = {name: ChannelFit() for name in norms}
    for name, inputs in batches:
        wanted = observed(teacher, norms, inputs.map(torch.clone), name)
        got = observed(student, norms, inputs, name)
        for place, target in wanted.items():
            if place in got and got[place].shape == target.shape:
                fits[owner(place)].add(got[place], target)
    return {name: fit.difference() for name, fit in fits.items()}
