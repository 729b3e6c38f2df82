"""The calibrated warm start: fits weight and bias of the normalizers to unlabelled samples."""

import collections
import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pn_compiler.base.config import TransformConfig
from pn_compiler.base.errors import ConfigError
from pn_compiler.graph.graph_module import sites
from pn_compiler.graph.warm_start import Calibrated
from pn_compiler.inspection.batch_norms import has_plain_forward
from pn_compiler.inspection.model_checks import refuse_uninitialised
from pn_compiler.nn import normalize
from pn_compiler.numerics.least_squares import ChannelFit, merged
from pn_compiler.passes import PipelineEdit
from pn_compiler.pipeline.conversion import convert
from pn_compiler.recovery.output_error import Batches, OutputError, observed, owner, put, values_of
from pn_compiler.recovery.site_constants import Norms
from pn_compiler.regions.regions import Trace
from pn_compiler.running.evaluation import batches_of, each_batch, of_each_shard, untouched
from pn_compiler.running.losses import squared_norm

EVALUATIONS = 12  # of the error and its gradient; more gains little: docs/calibration.md


def calibrate_prepared(
    traced: Trace,
    model: nn.Module,
    config: TransformConfig,
    batches: Iterable[Any] | None,
    edit: PipelineEdit | None = None,
) -> dict[str, Calibrated]:
    """Fits weight and bias of each site's normalizer in `traced` to `batches`; returns them by path.

    Args:
        traced: the prepared trace; it is left untouched.
        model: the model that it was traced from.
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
    """Fits weight and bias of all normalizers jointly to the outputs of the BatchNorm network.

    It minimizes |s - t|^2 / |t|^2 over all samples, where s are the outputs of `student` and t those of
    `teacher`; see `OutputError`. The descent (L-BFGS) starts at the better of two points: the current weight
    and bias, and a least-squares fit of each site alone, per channel, of the BatchNorm's output to the
    normalized input n that the site has in `teacher`::

        weight = cov(n, t) / var(n)        bias = mean(t) - weight mean(n)

    This fit is exact wherever a normalizer can be; where it cannot, the errors of the sites accumulate, which
    the descent reduces.

    Args:
        student: a network with GroupNorms in place of BatchNorms. It is modified.
        teacher: the BatchNorm network; it runs in eval mode. Values in half precision become float32.
        names: paths of the GroupNorms.
        batches: unlabelled samples, read once for the least squares, once per evaluation and once at the end.
            Torch's random numbers are the same each time.
        evaluations: number of evaluations of the error and its gradient.

    Returns:
        The result for each site that the data reaches, by path.

    Raises:
        ConfigError: no batch, values that are nan or infinite, or batches that the networks do not accept.
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
    """Converts half precision to float32: it is too coarse for gradients."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.float()


def _read(model: nn.Module, batches: Iterable[Any], title: str) -> Batches:
    """Yields all `batches`, with the same random numbers each time; call it within `untouched`."""
    torch.manual_seed(0)
    for name, inputs in each_batch(model, batches, title):
        yield name, inputs.map(lambda x: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)


# The results of the next functions are additive: each data shard can be summed where it is.


def _survey(
    teacher: nn.Module, sites: Norms, batches: Iterable[Any]
) -> tuple[dict[str, ChannelFit], dict[str, float]]:
    """(least-squares fit of each site that the data reaches, sum of squares of each output and site)."""
    fits: dict[str, ChannelFit] = {}
    powers: dict[str, float] = collections.defaultdict(float)

    def add(name: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        norm = sites[name]
        if isinstance(module, _BatchNorm) and not has_plain_forward(module):  # with an activation in it
            output = _BatchNorm.forward(module, args[0])
        n = normalize(norm, args[0])
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
    """Compares the output of each site with that of its BatchNorm."""
    fits = {name: ChannelFit() for name in names}
    with untouched(teacher), untouched(student):
        for name, inputs in _read(teacher, batches, "calibration: residuals"):
            expected = observed(teacher, names, inputs.map(torch.clone), name)
            actual = observed(student, names, inputs, name)
            for place, target in expected.items():
                if place in actual and actual[place].shape == target.shape:
                    fits[owner(place)].add(actual[place], target)
    return fits


def _solutions(norms: Norms, fits: Mapping[str, ChannelFit]) -> Tensor:
    """The least-squares fit of each site, laid out as `values_of`."""
    return torch.cat([part for name, norm in norms.items() for part in fits[name].solve(norm.weight)])


def _scale(norms: Norms) -> Tensor:
    """The magnitude of each weight, also used for its bias, laid out as `values_of`."""
    sizes = [norm.weight.detach().double().cpu().abs() for norm in norms.values()]
    return torch.cat([part for size in sizes for part in (size, size)])


def _descend(
    evaluate: Callable[[Tensor], tuple[float, Tensor]],
    starts: Sequence[Tensor],
    scale: Tensor,
    evaluations: int,
) -> Tensor:
    """The values of least error that L-BFGS visits, starting from the better of `starts`.

    Args:
        evaluate: values -> (error, gradient).
        starts: two points; one of them may overflow.
        scale: the unit of change of each value.
        evaluations: how many to use, besides those of `starts`.

    Source: Nocedal & Wright, "Numerical Optimization", 2nd ed., section 7.2; strong Wolfe conditions: 3.5.
    """
    known = [(values, *evaluate(values)) for values in starts]
    start, least, slope = min(known, key=lambda point: point[1] if math.isfinite(point[1]) else math.inf)
    best, ceiling = start, 10 * least
    ready = [(least, slope)]  # already evaluated
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
