"""The calibrated warm start: fits weight and bias of the normalizers to unlabelled samples."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pn_compiler.base.config import TransformConfig
from pn_compiler.base.errors import ConfigError
from pn_compiler.data.samples import Samples
from pn_compiler.freezing.site_constants import Norms
from pn_compiler.graph.graph_module import sites
from pn_compiler.graph.warm_start import Calibrated
from pn_compiler.inspection.batch_norms import has_plain_forward
from pn_compiler.inspection.model_checks import refuse_uninitialised
from pn_compiler.nn import normalize
from pn_compiler.numerics.least_squares import ChannelFit
from pn_compiler.passes import PipelineEdit
from pn_compiler.pipeline.conversion import convert
from pn_compiler.recovery.affine_fit import BATCH_SIZE, AffineFit
from pn_compiler.recovery.memory_layout import channels_last
from pn_compiler.regions.regions import Trace
from pn_compiler.running.evaluation import batches_of, inputs_of, run, untouched
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.losses import named_outputs

MOST_SAMPLES = 256  # that are trained on and held out
FIT_SAMPLES = 64  # for the least squares and the residuals: more change little, and take time
MOST_PIXELS = 1024  # of a channel of a sample, for the same
STEPS = 64


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
    steps: int = STEPS,
) -> dict[str, Calibrated]:
    """Fits weight and bias of all normalizers jointly to the BatchNorms of the network that was converted.

    A short training (`AffineFit`) reduces the distance of what the sites of `student` give from what the
    BatchNorms of `teacher` give. It starts at the better of two points: the current weight and bias, and a
    least-squares fit of each site alone, per channel, of the BatchNorm's output t to the normalized input n
    that the site has in `teacher`::

        weight = cov(n, t) / var(n)        bias = mean(t) - weight mean(n)

    This fit is exact wherever a normalizer can be; where it cannot, the errors of the sites accumulate, which
    the training reduces. What is kept is no worse than the current weight and bias, by the outputs for
    samples that are held out.

    Args:
        student: a network with GroupNorms in place of BatchNorms. It is modified.
        teacher: the BatchNorm network; it runs in eval mode. Values in half precision become float32.
        names: paths of the GroupNorms.
        batches: unlabelled samples, of which the first 256 are read and held in memory. The least squares and
            the residuals take 64 of them.
        steps: of the training.

    Returns:
        The result for each site that the data reaches, by path.

    Raises:
        ConfigError: no batch, values that are nan or infinite, or batches that the networks do not accept.
    """
    refuse_uninitialised(teacher)
    inputs = (_in_float32(inputs_of(batch, teacher)) for batch in batches_of(batches, again=True))
    _widen(student)
    _widen(teacher)
    student.requires_grad_(requires_grad=False)
    sites = {name: cast("nn.GroupNorm", student.get_submodule(name)) for name in names}
    with channels_last(teacher, student), untouched(teacher), untouched(student):  # in this order
        torch.manual_seed(0)
        samples = Samples.read(inputs, teacher, MOST_SAMPLES, "calibration")
        fits = _survey(teacher, sites, samples)
        norms = {name: norm for name, norm in sites.items() if name in fits}
        if not norms:
            return {}
        fit = AffineFit(student, teacher, norms, samples)
        fit.propose(_solutions(norms, fits))
        fit.train(steps)
        compared = _compare(student, teacher, tuple(norms), samples)
    return {
        name: Calibrated(norm.weight.double().cpu(), norm.bias.double().cpu(), compared[name].difference())
        for name, norm in norms.items()
    }


def _widen(model: nn.Module) -> None:
    """Converts half precision to float32: it is too coarse for gradients."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.float()


def _read(samples: Samples) -> Iterator[tuple[str, Inputs]]:
    """Name and arguments of the first batches."""
    size = 1 if samples.whole else BATCH_SIZE
    for rows in torch.split(torch.arange(min(len(samples), FIT_SAMPLES)), size):
        first, last = int(rows[0]) + 1, int(rows[-1]) + 1
        name = f"batch {first}" if samples.whole else f"samples {first} to {last}"
        yield name, samples.inputs(rows.tolist())


def _in_float32(inputs: Inputs) -> Inputs:
    return inputs.map(lambda x: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)


def _survey(teacher: nn.Module, sites: Norms, samples: Samples) -> dict[str, ChannelFit]:
    """The least-squares fit of each site that the data reaches."""
    fits: dict[str, ChannelFit] = {}

    def add(name: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        norm = sites[name]
        if isinstance(module, _BatchNorm) and not has_plain_forward(module):  # with an activation in it
            output = _BatchNorm.forward(module, args[0])
        n = normalize(norm, args[0])
        if not (n.isfinite().all() and output.isfinite().all()):
            raise ConfigError(f"the calibration data makes values that are nan or infinite at {name}")
        fits.setdefault(name, ChannelFit()).add(_thinned(n), _thinned(output))

    with contextlib.ExitStack() as stack:
        for name in sites:
            hook = teacher.get_submodule(name).register_forward_hook(functools.partial(add, name))
            stack.callback(hook.remove)
        for name, inputs in _read(samples):
            for place, output in _observed(teacher, (), inputs, name).items():
                if not output.isfinite().all():
                    raise ConfigError(f"{name} makes values that are nan or infinite at {place}")
    return fits


def _compare(
    student: nn.Module, teacher: nn.Module, names: Sequence[str], samples: Samples
) -> dict[str, ChannelFit]:
    """Compares the output of each site with that of its BatchNorm."""
    fits = {name: ChannelFit() for name in names}
    for name, inputs in _read(samples):
        expected = _observed(teacher, names, inputs.map(torch.clone), name)
        actual = _observed(student, names, inputs, name)
        for place, target in expected.items():
            if place in actual and actual[place].shape == target.shape:
                fits[_owner(place)].add(_thinned(actual[place]), _thinned(target))
    return fits


def _thinned(x: Tensor) -> Tensor:
    """Large maps [N, C, *] with every third, fifth, ... row and column: the others say the same.

    The step is odd, so that it meets every phase of a pattern that upsampling has left.
    """
    rank, step = x.dim() - 2, 1
    while rank and x.shape[2:].numel() > MOST_PIXELS * step**rank:
        step += 2
    return x[(slice(None), slice(None), *[slice(None, None, step)] * rank)]


def _observed(model: nn.Module, sites: Iterable[str], inputs: Inputs, name: str) -> dict[str, Tensor]:
    """Outputs of the modules `sites`, by path and call; without any, the outputs of `model` by their place.

    Raises:
        ConfigError: the model does not run on the inputs; the message says their `name`.
    """
    results: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, args: Any, output: Tensor) -> None:
        calls = sum(_owner(place) == path for place in results)
        results[f"{path} {calls + 1}"] = output.clone()  # later layers may modify it in place

    with contextlib.ExitStack() as stack:
        for path in sites:
            hook = model.get_submodule(path).register_forward_hook(functools.partial(keep, path))
            stack.callback(hook.remove)
        outputs = run(model, inputs, name)
    if not sites:
        results = {k: x for k, x in named_outputs(outputs).items() if x.is_floating_point()}
    return results


def _owner(place: str) -> str:
    """The path of a site without its call number; an output's place has no space in it."""
    return place.partition(" ")[0]


def _solutions(norms: Norms, fits: Mapping[str, ChannelFit]) -> Tensor:
    """The least-squares fit of each site, laid out as `values_of`."""
    return torch.cat([part for name, norm in norms.items() for part in fits[name].solve(norm.weight)])
