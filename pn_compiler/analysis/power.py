"""The paper's diagnosis of a normalized network: the power decomposition of its pre-activations."""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from pn_compiler.analysis.diagnosis import Diagnosis, SitePower
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import check_flags
from pn_compiler.graph.graph_module import is_converted, sites
from pn_compiler.graph.warm_start import is_trained
from pn_compiler.inspection.model_checks import refuse_uninitialised
from pn_compiler.nn import Normalizer, ProxyNormAct
from pn_compiler.running.copying import unwrap
from pn_compiler.running.evaluation import batches_of, each_batch, run, untouched

_NORMALIZERS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, Normalizer)


def diagnose(
    model: nn.Module, batches: Iterable[Any], *, batch_statistics: bool = False, affine: bool = False
) -> Diagnosis:
    """Decomposes the power of the pre-activations at every normalizer that `model` calls.

    Let y [N, C, *] be the normalized input **before** weight and bias, as in the paper (where the activation
    is phi(weight * y + bias)), and m and s its instance mean and instance standard deviation over space, per
    sample and channel. Then::

        P1 = (E m)^2    P2 = Var m    P3 = (E s)^2    P4 = Var s        P1 + P2 + P3 + P4 = E y^2

    E and Var (the population variance, divided by N) are taken over all samples of all batches, per channel;
    the powers are then averaged over channels. [N, C] inputs have no spatial axes: s = 0.

    Normalizers are ``nn.BatchNorm*``, ``SyncBatchNorm``, ``nn.InstanceNorm*``, ``nn.GroupNorm``,
    ``nn.LayerNorm`` over [C, *], their subclasses, and those of `pn_compiler.nn`. Functional calls such
    as ``F.group_norm`` are not seen. A module that is called several times counts as several sites.

    The model runs in eval mode without gradients, and its state is restored when this returns or raises:
    modes, buffers, hooks and attributes. So is torch's random state on CPU and CUDA, whatever `batches`
    draws.

    Args:
        model: any module, converted or not, on any device.
        batches: batches of inputs, such as a DataLoader or a list. Of a tuple or list the first element is
            the input, as in (images, labels), and as many as the forward needs, as in (left, right); a
            mapping holds arguments by name; anything else is the one argument. Tensors are moved to the
            device of the model. A single tensor or mapping is one batch. Memory does not grow with the
            number of batches.
        batch_statistics: let BatchNorm normalize with the statistics of each batch, as it does in training
            and in the paper's plots, instead of its running statistics. Use it for untrained networks, with
            batches as large as in training.
        affine: decompose weight * y + bias instead, the input of the activation. A warm start preserves that
            from the BatchNorm network, but not y: its bias undoes what P1 of y shows.

    Returns:
        One row for each site, in call order.

    Raises:
        ConfigError: there is no batch, the model does not run on one or has no values, or values are nan or
            infinite; the message names the first site.
        UnsupportedModelError: the model has uninitialised lazy modules.

    Source: Labatie et al., NeurIPS 2021 (arXiv 2106.03743), the power decomposition and Figure 2.
    """
    check_flags(batch_statistics=batch_statistics, affine=affine)
    model = unwrap(model)
    refuse_uninitialised(model)
    recorder = _Recorder(batch_statistics=batch_statistics, affine=affine)
    with untouched(model, batch_statistics=batch_statistics), recorder.hooked(model):
        for name, inputs in each_batch(model, batches_of(batches), "diagnosis"):
            recorder.begin(name)
            run(model, inputs, name)
    notes = [] if affine else _warm_note(model)
    return recorder.result(notes)


def _warm_note(model: nn.Module) -> list[str]:
    warm = sum(site.warm_start for site in sites(model)) if is_converted(model) else 0
    text = f"{warm} sites started warm: their bias undoes part of what P1 shows, see affine=True"
    return [text] if warm else []


class _Moments:
    """Running mean and population variance over N of batches of values [N, *], in float64.

    Merges means and sums of squared deviations (Chan, Golub and LeVeque, 1983), to avoid cancellation.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        count, mean = values.shape[0], values.mean(0)
        total, delta = self.count + count, mean - self.mean
        squares = ((values - mean) ** 2).sum(0)
        self.squares = self.squares + squares + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def powers(self) -> list[float]:
        """P1, P2, P3, P4 of the values [N, 2, C], which hold m and s."""
        return [float(p) for p in torch.stack([self.mean**2, self.squares / self.count], 1).mean(2).flatten()]


class _Recorder:
    """Records the moments of all normalizers' inputs while a model runs."""

    def __init__(self, *, batch_statistics: bool, affine: bool) -> None:
        self.batch_statistics = batch_statistics
        self.affine = affine
        self.moments: dict[str, tuple[nn.Module, _Moments]] = {}  # by name of the site
        self.calls: Counter[str] = Counter()  # of each module in this forward
        self.notes: dict[str, str] = {}  # by name of the module
        self.batch = ""

    @contextlib.contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(functools.partial(self._record, name), with_kwargs=True)
            for name, module in model.named_modules()
            if isinstance(module, _NORMALIZERS)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, batch: str) -> None:
        self.batch = batch
        self.calls.clear()

    def _record(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if refusal := _refusal(module, x, affine=self.affine):
            self.notes[name] = refusal
        elif x.numel():
            self.calls[name] += 1
            site = name or type(module).__name__
            site = site if self.calls[name] == 1 else f"{site}:{self.calls[name]}"
            y = _normalized(module, *_instance_moments(x))
            mean_and_deviation = torch.stack(_with_affine(module, *y) if self.affine else y, 1)
            if not mean_and_deviation.isfinite().all():
                raise ConfigError(f"{self.batch} makes values that are nan or infinite, first at {site}")
            self.moments.setdefault(site, (module, _Moments()))[1].add(mean_and_deviation)

    def result(self, notes: list[str]) -> Diagnosis:
        rows, new = [], []
        notes = [*notes, *(f"{name}: left out, {text}" for name, text in self.notes.items())]
        for name, (module, moments) in self.moments.items():
            if moments.count < 2:
                notes.append(f"{name}: left out, a variance over samples needs 2 of them, and it saw 1")
                continue
            channels = moments.mean.shape[1]
            rows.append(SitePower(name, _kind(module, channels), channels, moments.count, *moments.powers()))
            if isinstance(module, _BatchNorm) and not self.batch_statistics and _is_new(module):
                new.append(name)
        if new:
            notes.append(
                f"{len(new)} BatchNorms, {new[0]} first, have the running statistics of an untrained network "
                "and do not normalize: see batch_statistics=True"
            )
        if not self.moments and not self.notes:
            notes.append(
                "no normalizer is called as a module: functional calls are not seen, but "
                "pn_compiler.transform turns them into modules"
            )
        return Diagnosis(tuple(rows), tuple(notes))


def _is_new(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and not is_trained(norm)


def _refusal(module: nn.Module, x: Tensor, *, affine: bool) -> str:
    """Why `x` cannot be decomposed by channel; empty if it can."""
    shape = tuple(x.shape)
    if isinstance(module, nn.LayerNorm):
        over = module.normalized_shape
        if len(shape) < 2 or over != shape[1:]:
            return f"LayerNorm over the last {len(over)} axes of {shape}, not over [C, *]"
        per_element = affine and module.elementwise_affine and len(shape) > 2
        return "its weight and bias are per element, not per channel" if per_element else ""
    channels = getattr(module, "num_features", None) or module.num_channels
    return "" if len(shape) > 1 and shape[1] == channels else f"{shape} is not [N, {channels}, *]"


def _instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over space of x [N, C, *], each [N, C], float64 on the CPU."""
    values = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(values.reshape(*x.shape[:2], -1), dim=2, correction=0)
    return mean.cpu().double(), var.cpu().double()  # not every device has float64


def _normalized(module: nn.Module, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Instance mean and standard deviation of y, [N, C] each, from mean and variance of the input.

    y is the input minus one constant per instance and channel, times another: no pass over y is needed.
    """
    centre, spread = _statistics(module, mean, var)
    deviation = (spread + module.eps).sqrt()  # type: ignore[operator]  # eps of a module is a float
    return (mean - centre) / deviation, var.sqrt() / deviation


def _with_affine(module: nn.Module, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Instance mean and standard deviation of weight * y + bias, from those of y."""
    if isinstance(weight := module.weight, Tensor):
        factor = weight.detach().cpu().double()
        mean, deviation = mean * factor, deviation * factor.abs()
    if isinstance(bias := module.bias, Tensor):
        mean = mean + bias.detach().cpu().double()
    return mean, deviation


def _statistics(module: nn.Module, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and variance `module` normalizes with, [N or 1, C], from those of the instances [N, C]."""
    if isinstance(module, _BatchNorm | _InstanceNorm):
        stored = module.running_mean, module.running_var
        if not module.training and stored[0] is not None and stored[1] is not None:
            return stored[0].cpu().double()[None], stored[1].cpu().double()[None]
        if isinstance(module, _InstanceNorm):
            return mean, var
        # total variance = mean of the variances + variance of the means
        return mean.mean(0, True), var.mean(0, True) + mean.var(0, correction=0, keepdim=True)
    groups = _groups(module)
    grouped = mean.view(len(mean), groups, -1)
    centre = grouped.mean(2, True)
    spread = var.view_as(grouped).mean(2, True) + grouped.var(2, correction=0, keepdim=True)
    if isinstance(module, Normalizer) and module.statistics != "group":
        population, anchor, fixed = (
            None if value is None else value.cpu().view(1, groups, 1) for value in module.constants()
        )
        assert population is not None
        assert anchor is not None
        if fixed is not None:  # deviations are about it
            centre, spread = fixed.expand_as(centre), spread + (centre - fixed) ** 2
        spread = (1 - anchor) * spread + anchor * population
    return centre.expand_as(grouped).flatten(1), spread.expand_as(grouped).flatten(1)


def _groups(module: nn.Module) -> int:
    return module.num_groups if isinstance(module, nn.GroupNorm | Normalizer) else 1


def _kind(module: nn.Module, channels: int) -> str:
    if isinstance(module, _BatchNorm):
        return "BN"
    groups = channels if isinstance(module, _InstanceNorm) else _groups(module)
    rms = isinstance(module, Normalizer) and module.statistics == "rms"
    kind = "RMS" if rms else "LN" if groups == 1 else "IN" if groups == channels else "GN"
    return f"{kind}+PN" if isinstance(module, ProxyNormAct) else kind
