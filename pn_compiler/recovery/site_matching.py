"""How far the normalizers of a converted network are from the BatchNorms they replaced, to train on."""

import collections
import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pn_compiler.nn import FollowedAnchoredNorm, FollowedGroupNorm, Normalizer, ProxyNormAct
from pn_compiler.numerics.affine import per_channel
from pn_compiler.running.evaluation import run
from pn_compiler.running.inputs import Inputs

_FEWEST_ENDS = 0.25  # share of sites without an activation, to do without the others
Target = tuple[Tensor, float]  # what a BatchNorm gives, and its variance


class SiteMatching:
    """Compares the sites of a converted network with the BatchNorms at the same paths of its teacher.

    A few hundred samples have few outputs to learn from, but millions of values at the sites. It is false
    where there is nothing to compare: the student is not a conversion of the teacher, or was folded.

    Args:
        student: a network whose sites give what the BatchNorms give, as after a warm start, or nearly.
        teacher: the network that was converted. It is run in its current mode.

    Attributes:
        targets: of each call of each site, in order, for the next comparison.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        norms = {name: m for name, m in teacher.named_modules() if isinstance(m, _BatchNorm)}
        sites = {name: m for name, m in student.named_modules() if isinstance(m, nn.GroupNorm | Normalizer)}
        uses = collections.Counter(m.activation for m in sites.values() if isinstance(m, ProxyNormAct))
        self._teacher = teacher
        pairs = [
            (site, norms[name])
            for name, site in sites.items()
            if name in norms and norms[name].running_mean is not None
            if not (isinstance(site, ProxyNormAct) and uses[site.activation] > 1)  # calls of other sites
        ]
        # The ends of residual branches and bottlenecks say as much as all sites do, in half of the time.
        ends = [pair for pair in pairs if not isinstance(pair[0], ProxyNormAct)]
        self._pairs = ends if len(ends) >= _FEWEST_ENDS * len(pairs) else pairs
        # What a site hands on is scaled, which its consumers have absorbed with the initial scale.
        self._scales = [_scale(site) for site, _ in self._pairs]
        self.targets: list[list[Target]] = []
        self._distances: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def observe_teacher(self, inputs: Inputs) -> None:
        """Runs the teacher on `inputs`, and keeps what its BatchNorms give."""
        self.targets = [[] for _ in self._pairs]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for targets, (_, norm) in zip(self.targets, self._pairs, strict=True):
                hook = norm.register_forward_pre_hook(functools.partial(_keep, targets), with_kwargs=True)
                stack.callback(hook.remove)
            run(self._teacher, inputs, "a batch for the teacher")

    @contextlib.contextmanager
    def comparing(self) -> Iterator[None]:
        """Compares what the student gives for the same inputs, when it is run."""
        self._distances = []
        with contextlib.ExitStack() as stack:
            for (site, _), targets, scale in zip(self._pairs, self.targets, self._scales, strict=True):
                compare = functools.partial(self._compare, targets, scale)
                reader = _reader(site)
                if reader is None:
                    hook = site.register_forward_hook(functools.partial(_pass_output, compare))
                else:
                    hook = reader.register_forward_pre_hook(functools.partial(_pass_input, compare))
                stack.callback(hook.remove)
            yield
        self.targets = []

    def distance(self) -> Tensor | None:
        """Mean over all calls of |s - t|^2 / |t - mean(t)|^2, with t what the BatchNorm gives, s the site."""
        return torch.stack(self._distances).mean() if self._distances else None

    def _compare(self, targets: list[Target], scale: Tensor | None, actual: Tensor) -> None:
        # The moments of an activation call it, too; and the student may take another branch than the teacher.
        if not targets or actual.shape != targets[0][0].shape:
            return
        expected, variance = targets.pop(0)
        if 0 < variance < math.inf:
            # Neither division nor subtraction keeps `actual`, which an activation may overwrite.
            values = actual if scale is None else actual / per_channel(scale, actual)
            self._distances.append((values - expected.to(values.dtype)).square().mean() / variance)


def _reader(site: nn.Module) -> nn.Module | None:
    """The module within `site` that takes what its BatchNorm gives; None if the site itself returns it."""
    if isinstance(site, ProxyNormAct):
        return site.activation
    if isinstance(site, FollowedGroupNorm | FollowedAnchoredNorm):
        return site.get_submodule(site.following[0])
    return None


@torch.no_grad()
def _scale(site: nn.Module) -> Tensor | None:
    scaled = isinstance(site, ProxyNormAct) and site.scales_affine
    return cast("ProxyNormAct", site).scale_and_shift()[0] if scaled else None


def _keep(targets: list[Target], norm: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The module itself may do more than normalize."""
    x = next(iter((*args, *kwargs.values())))
    expected = F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
    )
    targets.append((expected, float(expected.var(correction=0))))


def _pass_input(compare: Any, module: nn.Module, args: tuple[Any, ...]) -> None:
    compare(args[0])


def _pass_output(compare: Any, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    compare(output)
