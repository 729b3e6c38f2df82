"""How far a converted network is from the one it came from: a conversion changes outputs on purpose."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from pn_compiler.base.tables import short_percent
from pn_compiler.data.samples import Samples
from pn_compiler.nn import Normalizer, normalize
from pn_compiler.running.evaluation import run, seed_everything, untouched
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.losses import Logits, agreement, divergence, named_outputs

MOST_SAMPLES = 256
# Points of accuracy that public networks lost without data: docs/real_networks.md.
_LOST = "at most 1 point with the defaults, up to 9 with --norm layer and 37 with --norm group (norm=)"
_SAME = 1e-3  # relative L2 of outputs, below which training would find nothing to learn from
_BATCH = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Fidelity:
    """Distance of the outputs of a converted network to those of the original one; ``str`` is for people.

    Attributes:
        data: what both ran on, in words; the result may have been trained on it.
        representative: whether that is data of the user's, and not an example of unknown meaning.
        relative_l2: |c - o| / |o| over all samples and values, with c the converted outputs and o those of
            the original; of several outputs that of the worst. None if they cannot be compared.
        kl: divergence KL(softmax(o) || softmax(c)) of logits in nats, mean over samples; None without logits.
        same_class: share of samples to which both give the same class, from 0 to 1; None without logits.
        kept: whether the conversion is meant to keep the outputs, as a warm start is.
        sites: path of each BatchNorm -> |n - t| / |t|, with n what is there now and t what the BatchNorm
            gives, both for the input that it has in the original network: where the distance enters.
        unchanged: share of the values of outputs of whole numbers and booleans, such as classes, that stay
            the same, from 0 to 1; of several outputs that of the worst. None without such an output.
        not_compared: outputs that only one of the networks gives, or in another shape, such as boxes.
    """

    data: str
    representative: bool
    relative_l2: float | None
    kl: float | None
    same_class: float | None
    kept: bool = True
    sites: dict[str, float] = dataclasses.field(default_factory=dict)
    unchanged: float | None = None
    not_compared: tuple[str, ...] = ()

    def __str__(self) -> str:
        classes = ""
        if self.kl is not None and self.same_class is not None:
            classes = f", KL divergence {self.kl:.2g} nats, {100 * self.same_class:.1f} % keep their class"
        moved = []
        if self.relative_l2 is not None:
            moved.append(f"outputs moved by {short_percent(self.relative_l2)} (relative L2){classes}")
        if self.unchanged is not None:
            moved.append(f"{100 * self.unchanged:.1f} % of the whole numbers stay the same")
        if self.not_compared:
            moved.append(f"other shapes than before have {', '.join(self.not_compared[:3])}")
        worst = sorted(self.sites.items(), key=lambda item: -item[1])[:3]
        where = ", ".join(f"{name} {short_percent(error)}" for name, error in worst)
        distance = ", ".join(moved) or "outputs hold no values to compare"
        return f"{distance}, on {self.data}" + (f"; most enters at {where}" if where else "")

    @property
    def advice(self) -> str:
        """What to do next."""
        if not self.kept:
            return "there was no warm start: train the converted network, which starts from other outputs"
        if not self.representative:
            return (
                f"this says nothing about accuracy, of which real networks lose {_LOST}: measure and recover "
                "it on a few hundred unlabelled samples, with --calibrate DATA --distill 150 "
                "(calibration=, distill_steps=150)"
            )
        if self.relative_l2 is not None and self.relative_l2 < _SAME:
            return f"{self._cost}there is nothing to recover"
        return f"{self._cost}--distill STEPS (distill_steps=) brings them closer; more samples, closer still"

    @property
    def _cost(self) -> str:
        """The most accuracy that this can have cost: where the class is kept, so is what is right."""
        if self.same_class is None:
            return ""
        return f"on these samples it cost at most {100 * (1 - self.same_class):.1f} points of accuracy; "


def measure(
    original: nn.Module,
    converted: nn.Module,
    batches: Any,
    *,
    representative: bool = True,
    kept: bool = True,
    sites: Iterable[str] = (),
    logits: Logits = "auto",
    trained_on: bool = False,
) -> Fidelity:
    """Runs both networks in eval mode on at most 256 samples of `batches`, and compares their outputs.

    Args:
        original, converted: left as they are.
        batches: as for `pn_compiler.distill`.
        representative: whether they are data that the network is for.
        kept: whether `converted` is meant to give the same outputs.
        sites: paths of the BatchNorms of `original` to compare one by one.
        logits: which outputs hold logits, as in `pn_compiler.distill`.
        trained_on: whether `converted` was distilled on these batches, so that others are worse.

    Raises:
        ConfigError: there is no batch, or the networks do not run on it.
    """
    outputs = _Outputs()
    classes: list[tuple[int, float, float]] = []  # samples, divergence, agreement
    errors = _SiteErrors(original, converted, sites)
    with untouched(original, keep_state=True), untouched(converted, keep_state=True):
        seed_everything()
        samples = _read(original, batches, representative)
        name = "the samples" if representative else "the example inputs"
        with errors.watching():
            for inputs in _batches(samples):
                seed_everything()
                expected = _detached(run(original, inputs, name))
                seed_everything()
                actual = _detached(run(converted, inputs, name))
                outputs.add(actual, expected)
                rows = _length(inputs)
                pair = _of_samples(actual, rows), _of_samples(expected, rows)
                kl, same = divergence(*pair, logits), agreement(*pair, logits)
                if kl is not None and same is not None:
                    classes.append((rows, kl, same))
    count = sum(n for n, _, _ in classes)
    return Fidelity(
        _describe(samples, representative) + (", most of which it was trained on" if trained_on else ""),
        representative,
        max((_ratio(*pair) for pair in outputs.distances.values()), default=None),
        sum(n * kl for n, kl, _ in classes) / count if count else None,
        sum(n * same for n, _, same in classes) / count if count else None,
        kept,
        errors.relative(),
        min((same / count for same, count in outputs.same.values() if count), default=None),
        tuple(outputs.not_compared),
    )


def _read(original: nn.Module, batches: Any, representative: bool) -> Samples:
    if isinstance(batches, Inputs) and not representative:
        return Samples([(batches.args, dict(batches.kwargs))], whole=True)
    return Samples.read(batches, original, MOST_SAMPLES, "fidelity")


def _describe(samples: Samples, representative: bool) -> str:
    if not representative:
        return "the example inputs"
    unit = "batch" if samples.whole else "sample"
    plural = "" if len(samples) == 1 else "es" if samples.whole else "s"
    return f"{len(samples)} {unit}{plural} of the calibration data"


def _batches(samples: Samples) -> Iterator[Inputs]:
    rows = torch.arange(len(samples))
    for part in torch.split(rows, 1 if samples.whole else _BATCH):
        yield samples.inputs(part.tolist())


def _length(inputs: Inputs) -> int:
    first = next(x for x in inputs.tensors() if x.dim())
    return len(first)


def _of_samples(outputs: Any, count: int) -> dict[str, Tensor]:
    """The outputs with a row for each of `count` samples: boxes [M, 4] are no logits."""
    return {name: x for name, x in named_outputs(outputs).items() if x.dim() and len(x) == count}


def _detached(outputs: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.detach, outputs)


class _Outputs:
    """What is summed of each output, by name.

    Attributes:
        distances: |c - o|^2 and |o|^2.
        same: of whole numbers and booleans, how many are the same, and how many there are.
        not_compared: names of those that have been missing or of another shape, in order.
    """

    def __init__(self) -> None:
        self.distances: dict[str, list[float]] = {}
        self.same: dict[str, list[int]] = {}
        self.not_compared: dict[str, None] = {}

    def add(self, actual: Any, expected: Any) -> None:
        ours, theirs = named_outputs(actual), named_outputs(expected)
        self.not_compared |= dict.fromkeys(name for name in ours if name not in theirs)
        for name, tensor in theirs.items():
            other = ours.get(name)
            if other is None or other.shape != tensor.shape:
                self.not_compared[name] = None
            elif not tensor.numel():
                continue  # no boxes before and after say nothing
            elif tensor.is_floating_point():
                total = self.distances.setdefault(name, [0.0, 0.0])
                total[0] += float((other.double() - tensor.double()).square().sum())
                total[1] += float(tensor.double().square().sum())
            else:
                count = self.same.setdefault(name, [0, 0])
                count[0] += int((other == tensor).sum())
                count[1] += tensor.numel()


def _ratio(difference: float, power: float) -> float:
    return math.sqrt(difference / power) if power else math.sqrt(difference)


class _SiteErrors:
    """Local error of each site: normalizer against BatchNorm, on the input that the BatchNorm has."""

    def __init__(self, original: nn.Module, converted: nn.Module, sites: Iterable[str]) -> None:
        self._pairs: dict[str, tuple[_BatchNorm, nn.GroupNorm | Normalizer]] = {}
        self._totals: dict[str, list[float]] = {}
        for name in sites:
            with contextlib.suppress(AttributeError):  # a functional batch_norm, or one that was frozen
                norm, new = original.get_submodule(name), converted.get_submodule(name)
                if isinstance(norm, _BatchNorm) and isinstance(new, nn.GroupNorm | Normalizer):
                    self._pairs[name] = norm, new

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, (norm, _) in self._pairs.items():
                hook = norm.register_forward_pre_hook(functools.partial(self._add, name))
                stack.callback(hook.remove)
            yield

    @torch.no_grad()  # a forward may switch gradients on
    def _add(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        norm, new = self._pairs[name]
        if not args or norm.running_mean is None:
            return
        x: Tensor = args[0].detach()
        expected = F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
        )
        actual = normalize(new, x, new.weight, new.bias)
        total = self._totals.setdefault(name, [0.0, 0.0])
        total[0] += float((actual.double() - expected.double()).square().sum())
        total[1] += float(expected.double().square().sum())

    def relative(self) -> dict[str, float]:
        return {name: _ratio(*total) for name, total in self._totals.items()}
