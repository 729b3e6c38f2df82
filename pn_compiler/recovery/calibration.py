"""Weight and bias of normalizers, from unlabelled samples: the calibrated warm start."""

import collections
import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pn_compiler.base.config import TransformConfig
from pn_compiler.base.errors import ConfigError
from pn_compiler.graph.graph_module import sites
from pn_compiler.graph.warm_start import Calibrated
from pn_compiler.inspection.batch_norms import has_plain_forward
from pn_compiler.inspection.model_checks import refuse_uninitialised
from pn_compiler.numerics.least_squares import ChannelFit, merged
from pn_compiler.passes import PipelineEdit
from pn_compiler.pipeline.conversion import convert
from pn_compiler.recovery.output_error import Batches, OutputError, observed, owner, put, values_of
from pn_compiler.recovery.site_constants import Norms
from pn_compiler.regions.regions import Trace
from pn_compiler.running.evaluation import batches_of, each_batch, of_each_shard, untouched
from pn_compiler.running.losses import squared_norm

EVALUATIONS = 12  # of the error and its gradient; more gain little: docs/calibration.md


def calibrate_prepared(
    traced: Trace,
    model: nn.Module,
    config: TransformConfig,
    batches: Iterable[Any] | None,
    edit: PipelineEdit | None = None,
) -> dict[str, Calibrated]:
    """Weight and bias of the normalizer of each site of `traced`, by path, fitted to `batches`.

    Args:
        traced: prepared; left as it is.
        model: what it was traced from.
        edit: of the pipeline, as in `convert`.
    """
    if batches is None:
        raise ConfigError("warm_start='calibrate' needs samples: give calibration=, batches of inputs")
    teacher, student = copy.deepcopy(traced), copy.deepcopy(traced)
    plain = dataclasses.replace(config, proxy=False)  # the normalizers alone, as modules of their own
    convert(student, model, plain, edit=edit)
    names = [site.name for site in sites(student.root) if site.kind != "skipped"]
    return calibrate(student.root, teacher.root, names, batches)


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
    student.requires_grad_(requires_grad=False)
    sites = {name: cast("nn.GroupNorm", student.get_submodule(name)) for name in names}
    surveys = of_each_shard(functools.partial(_survey, teacher, sites), batches)
    fits = merged(fits for fits, _ in surveys)
    norms = {name: norm for name, norm in sites.items() if name in fits}
    if not norms:
        return {}
    powers = sum((collections.Counter(powers) for _, powers in surveys), collections.Counter[str]())
    error = OutputError(student, teacher, norms, powers)

    def evaluate(values: Tensor) -> tuple[float, Tensor]:
        put(norms, values)
        parts = of_each_shard(functools.partial(_evaluate, error), batches)
        return sum(value for value, _ in parts), torch.stack([gradient for _, gradient in parts]).sum(0)

    starts = [values_of(norms), _solutions(norms, fits)]
    put(norms, _descend(evaluate, starts, _scale(norms), evaluations))
    compared = merged(of_each_shard(functools.partial(_compare, student, teacher, tuple(norms)), batches))
    return {
        name: Calibrated(norm.weight.double().cpu(), norm.bias.double().cpu(), compared[name].difference())
        for name, norm in norms.items()
    }


def _widen(model: nn.Module) -> None:
    """Half precision is too coarse for gradients."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.float()


def _read(model: nn.Module, batches: Iterable[Any], title: str) -> Batches:
    """All `batches`, drawn with the same random numbers each time; within `untouched`."""
    torch.manual_seed(0)
    for name, inputs in each_batch(model, batches, title):
        yield name, inputs.map(lambda x: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)


# What follows is additive: shards of the data can be summed up where they are.


def _survey(
    teacher: nn.Module, sites: Norms, batches: Iterable[Any]
) -> tuple[dict[str, ChannelFit], dict[str, float]]:
    """(least squares of each site that is reached, sum of squares of each output and site)."""
    fits: dict[str, ChannelFit] = {}
    powers: dict[str, float] = collections.defaultdict(float)

    def add(name: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        norm = sites[name]
        if isinstance(module, _BatchNorm) and not has_plain_forward(module):  # with an activation in it
            output = _BatchNorm.forward(module, args[0])
        n = F.group_norm(args[0], norm.num_groups, None, None, norm.eps)
        if not (n.isfinite().all() and output.isfinite().all()):
            raise ConfigError(f"the calibration data makes values that are nan or infinite at {name}")
        fits.setdefault(name, ChannelFit()).add(n, output)
        powers[name] += squared_norm(output)

    with untouched(teacher), contextlib.ExitStack() as stack:
        for name in sites:
            hook = teacher.get_submodule(name).register_forward_hook(functools.partial(add, name))
            stack.callback(hook.remove)
        for name, inputs in _read(teacher, batches, "calibration: sites"):
            for place, output in observed(teacher, (), inputs, name).items():
                if not output.isfinite().all():
                    raise ConfigError(f"{name} makes values that are nan or infinite at {place}")
                powers[place] += squared_norm(output)
    return fits, powers


def _evaluate(error: OutputError, batches: Iterable[Any]) -> tuple[float, Tensor]:
    """Error of the outputs and its gradient."""
    with untouched(error.teacher), untouched(error.student):
        return error(_read(error.teacher, batches, "calibration: outputs"))


def _compare(
    student: nn.Module, teacher: nn.Module, names: Sequence[str], batches: Iterable[Any]
) -> dict[str, ChannelFit]:
    """What each site gives, beside its BatchNorm."""
    fits = {name: ChannelFit() for name in names}
    with untouched(teacher), untouched(student):
        for name, inputs in _read(teacher, batches, "calibration: residuals"):
            wanted = observed(teacher, names, inputs.map(torch.clone), name)
            got = observed(student, names, inputs, name)
            for place, target in wanted.items():
                if place in got and got[place].shape == target.shape:
                    fits[owner(place)].add(got[place], target)
    return fits


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
