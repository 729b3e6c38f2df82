"""Fits weight and bias of all normalizers together to the BatchNorms that they replaced."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pn_compiler.data.samples import Samples
from pn_compiler.freezing.site_constants import Norms
from pn_compiler.recovery.schedule import rate_share
from pn_compiler.recovery.site_matching import SiteMatching
from pn_compiler.running.evaluation import run
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.losses import agreement, distance, named_outputs

BATCH_SIZE = 16  # of what is not trained on
STEP_SIZE = 8  # samples
EVALUATE_EVERY = 16  # steps
RATE = 4e-3  # Adam's highest, relative to the weights of a site
WARM_UP = 0.125  # share of the steps in which the rate rises to its highest
HELD_OUT = 0.25
_EXACT = 1e-12  # a distance that leaves nothing to learn
_FEWEST_TO_SPARE = 32  # samples; of fewer, none are held out


class Score(NamedTuple):
    """How the student does on the held-out samples.

    Attributes:
        distance: of its outputs from the teacher's; of its sites, where outputs cannot be compared.
        agreement: share of samples with the teacher's class; None without logits.
    """

    distance: float
    agreement: float | None

    def better_than(self, best: "Score", start: "Score") -> bool:
        """Whether it is nearer than the best so far, with no fewer of the teacher's classes than at first."""
        if not math.isfinite(best.distance):
            return math.isfinite(self.distance)
        if math.isfinite(start.distance) and self.agreement is not None and start.agreement is not None:
            return self.distance < best.distance and self.agreement >= start.agreement
        return self.distance < best.distance


class AffineFit:
    """Trains weight and bias of the normalizers, and keeps the values that are best on held-out samples.

    What Adam minimizes is the distance of `SiteMatching`. What is kept is decided by the outputs, for a
    quarter of the samples that it does not train on: there the result is never worse than the start. Call it
    within `untouched` of both networks.

    Args:
        student: a network in which no parameter requires a gradient.
        teacher: the BatchNorm network that it was converted from.
        norms: normalizers of the student, by path.
        samples: inputs of both.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, norms: Norms, samples: Samples) -> None:
        self._student, self._norms, self._samples = student, norms, samples
        self._sites = SiteMatching(student, teacher)
        self._generator = torch.Generator().manual_seed(0)
        size = 1 if samples.whole else BATCH_SIZE
        every = torch.arange(len(samples))
        spare = len(samples) >= _FEWEST_TO_SPARE
        held, self._train = samples.divide(HELD_OUT, self._generator) if spare else (every, every)
        self._size = min(1 if samples.whole else STEP_SIZE, len(self._train))
        self._held_out = [samples.inputs(rows.tolist()) for rows in torch.split(held, size)]
        self._expected = [run(teacher, inputs.map(torch.clone), "a batch") for inputs in self._held_out]
        self._best = values_of(norms)
        self._score = self._start = self._evaluate()

    def propose(self, values: Tensor) -> Score:
        """Keeps `values` of the sites, laid out as `values_of`, if they are the best so far."""
        put(self._norms, values)
        score = self._evaluate()
        if score.better_than(self._score, self._start):
            self._best, self._score = values, score
        return score

    def train(self, steps: int) -> None:
        """Trains for some steps from the best values so far, and leaves the sites with the best ones.

        If it becomes worse than the start, it goes back to the best values and continues at a quarter of the
        learning rate.
        """
        put(self._norms, self._best)
        if not self._sites or self._score.distance <= _EXACT:
            return
        with _trainable(self._norms):
            optimizer, factor, restart = self._adam(), RATE, 0
            for step in range(steps):
                share = rate_share(step, steps, warm_up=WARM_UP * steps, restart=restart)
                for group in optimizer.param_groups:
                    group["lr"] = factor * share * group["scale"]
                if not self._step(optimizer):
                    break
                if (step + 1) % EVALUATE_EVERY and step + 1 < steps:
                    continue
                if not self.propose(values_of(self._norms)).distance <= self._start.distance:
                    put(self._norms, self._best)
                    optimizer, factor, restart = self._adam(), factor / 4, step + 1
        put(self._norms, self._best)

    def _adam(self) -> torch.optim.Adam:
        """An optimizer with a group for each site: weights of different sites may differ in size."""
        return torch.optim.Adam([
            {"params": [norm.weight, norm.bias], "scale": float(norm.weight.detach().square().mean().sqrt())}
            for norm in self._norms.values()
        ])  # fmt: skip

    def _step(self, optimizer: torch.optim.Adam) -> bool:
        """One step on random samples; false if its gradient is not finite, or there is none."""
        order = torch.randperm(len(self._train), generator=self._generator)
        inputs = self._samples.inputs(self._train[order[: self._size]].tolist())
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = self._distance_of_sites(inputs)
            if loss is None or not loss.isfinite():
                return False
            torch.autograd.backward(loss)
        gradients = [p.grad for p in _parameters(self._norms) if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            return False
        optimizer.step()
        return True

    def _distance_of_sites(self, inputs: Inputs) -> Tensor | None:
        self._sites.observe_teacher(inputs.map(torch.clone))
        with self._sites.comparing():
            run(self._student, inputs.map(torch.clone), "a batch")
        return self._sites.distance()

    @torch.no_grad()
    def _evaluate(self) -> Score:
        total = same = 0.0
        count = classes = 0
        for inputs, expected in zip(self._held_out, self._expected, strict=True):
            rows = self._rows(inputs)
            outputs = run(self._student, inputs.map(torch.clone), "a batch")
            if _comparable(outputs, expected, rows):
                far, share = distance(outputs, expected), agreement(outputs, expected)
            else:
                sites = self._distance_of_sites(inputs)
                far, share = 0.0 if sites is None else float(sites), None
            total, count = total + far * rows, count + rows
            if share is not None:
                same, classes = same + share * rows, classes + rows
        return Score(total / count, same / classes if classes else None)

    @staticmethod
    def _rows(inputs: Inputs) -> int:
        return next((len(x) for x in inputs.tensors() if x.dim()), 1)


def _comparable(outputs: Any, expected: Any, rows: int) -> bool:
    """Whether both have floating-point outputs with one entry a sample, of the same shapes: not boxes."""
    shapes = [
        {name: x.shape for name, x in named_outputs(values).items() if x.is_floating_point()}
        for values in (outputs, expected)
    ]
    return bool(shapes[0]) and shapes[0] == shapes[1] and all(s[:1] == (rows,) for s in shapes[0].values())


def values_of(norms: Norms) -> Tensor:
    """Weight and bias of all sites, concatenated site by site, float64 on the CPU: 2 C values for each."""
    return torch.cat([p.detach().double().cpu() for p in _parameters(norms)])


def _parameters(norms: Norms) -> list[Tensor]:
    return [p for norm in norms.values() for p in (norm.weight, norm.bias)]


@torch.no_grad()
def put(norms: Norms, values: Tensor) -> None:
    """Sets weight and bias of the sites from `values`, laid out as `values_of` returns them."""
    parameters = _parameters(norms)
    for parameter, part in zip(parameters, torch.split(values, [len(p) for p in parameters]), strict=True):
        parameter.copy_(part)


@contextlib.contextmanager
def _trainable(norms: Norms) -> Iterator[None]:
    """Lets weights and biases require gradients."""
    with contextlib.ExitStack() as stack:
        for parameter in _parameters(norms):
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_()
        yield
