"""The training loop of a distillation: its steps, the best held-out result, and its checkpoint."""

import dataclasses
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pn_compiler.base.errors import ConfigError, LoadError
from pn_compiler.base.progress import bar
from pn_compiler.data.metric import Metric
from pn_compiler.data.samples import Outputs, Samples, digest
from pn_compiler.recovery.eval_result import EvalResult, mean_result
from pn_compiler.recovery.schedule import rate_share
from pn_compiler.recovery.site_matching import SiteMatching
from pn_compiler.recovery.site_targets import SiteTargets
from pn_compiler.running.evaluation import run
from pn_compiler.running.losses import Logits, agreement, distance, divergence

Loss = Callable[[Any, Any], Tensor]  # (student's outputs, teacher's outputs) -> scalar

EVALUATE_EVERY = 25  # steps
SAVE_EVERY = 5.0  # seconds
_SIZE = 0.1  # root mean square of a parameter that learns at the learning rate itself, to match sites
_LEAST_SIZES = (0.1, 0.01)  # of parameters with one value a channel, which may start as zeros; of others
BACKOFF = 0.25  # factor on the learning rate at each rollback
WARM_UP = 0.1  # share of the steps, and at most 20, in which the learning rate rises to its highest
_MOST_WARM_UP = 20
_FAR = 0.1  # initial distance of the sites from which on the learning rate is not reduced
_PIECE = 2**20  # values of inputs that run at once: four images of 224 pixels, of which 20 MB at a site
_KIND = "pn_compiler.distill, version 4"


class Trainer:
    """Trains the student with Adam and keeps its best state.

    It learns from the outputs of its teacher and, where it was converted from that, from its BatchNorms. If
    an evaluation is far worse than the initial one, or two in a row are worse, the steps are too long: the
    trainer rolls back to the best state and continues with a new Adam at a quarter of the learning rate.

    Args:
        student: trained in place, in its current mode.
        teacher, samples: the target outputs, and the samples that they belong to.
        loss: returns a scalar.
        by_loss: whether it also decides what is kept, instead of agreement and divergence.
        metric: what decides before all of them; or None.
        sites: the sites to match besides; false if there are none.
        output_share: weight of the loss, relative to its initial value, beside the distance of the sites.
        lr: the highest learning rate. It is reached in a short warm-up and falls to zero along a cosine. To
            match sites it is that of a parameter of root mean square 0.1, in a student that is far from
            them; others have theirs in proportion.
        logits: which outputs `agreement` compares.
        seed: of torch's random numbers, for a student that draws some.
        batches: the samples of each step.
        held_out: the samples for evaluation, in batches.

    Attributes:
        step: number of steps done.
        start, result: evaluation of the initial student, and the best one so far.
        rollbacks: how often it rolled back.
        seconds: time spent in steps and evaluations.
        stopped: why it stopped early, or "".

    Raises:
        ConfigError: the student does not fit its teacher or the samples.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Outputs,
        samples: Samples,
        loss: Loss,
        *,
        by_loss: bool,
        metric: Metric | None,
        sites: SiteMatching,
        output_share: float,
        lr: float,
        logits: Logits,
        seed: int,
        batches: Sequence[Tensor],
        held_out: Sequence[Tensor],
    ) -> None:
        self._student, self._teacher, self._samples, self._loss = student, teacher, samples, loss
        self._by_loss, self._sites, self._output_share = by_loss, sites, output_share
        self._metric, self._lr, self._logits, self._seed = metric, lr, logits, seed
        self._batches, self._held_out = batches, held_out
        self._parameters = [p for p in student.parameters() if p.requires_grad]
        self._targets = SiteTargets(sites, samples, batches)
        self._lr *= self._caution()
        self._factors = [self._factor(p) for p in self._parameters]
        self._optimizer = self._adam()
        self._best = self._copies()
        self._restart = 0  # the step at which the optimizer was new
        self.step, self.rollbacks, self.seconds, self.stopped = 0, 0, 0.0, ""
        self.start = self.result = self._previous = self._evaluate()
        if not math.isfinite(self.start.loss):
            raise ConfigError("the loss is nan or infinite before the first step: so are the model's outputs")
        if metric is not None and not math.isfinite(self.start.metric or 0.0):
            raise ConfigError(f"the metric {metric.name} is {self.start.metric} before the first step")

    def train(self, checkpoint: "Checkpoint | None" = None) -> None:
        """Runs the remaining steps and leaves the student in its best state."""
        total = len(self._batches)
        with bar("distillation", total, done=self.step) as advance:
            while self.step < total and not self.stopped:
                began = time.monotonic()
                self._advance()
                self.seconds += time.monotonic() - began
                advance(f"distillation: held-out loss {self.result.loss:.4g}")
                if checkpoint is not None:
                    checkpoint.save(self, last=self.step == total or bool(self.stopped))
        self._optimizer.zero_grad()
        self._assign(self._best)

    def _advance(self) -> None:
        """Runs one step, and evaluates if it is due."""
        number = self.step + 1
        torch.manual_seed(self._seed + number)  # so that a resumed run draws the same numbers
        self._optimizer.zero_grad()
        with torch.enable_grad():
            loss = self._add_gradients(self._batches[self.step])
        norm = nn.utils.get_total_norm(p.grad for p in self._parameters if p.grad is not None)
        if not (loss.isfinite() and norm.isfinite()):
            self.stopped = f"loss or gradient of step {number} is nan or infinite"
            return
        rate = self._rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self._optimizer.step()
        self.step = number
        if number % EVALUATE_EVERY and number < len(self._batches):
            return
        evaluated = self._evaluate()
        if not math.isfinite(evaluated.loss):
            self.stopped = f"the held-out loss is nan or infinite after step {number}"
        elif evaluated.better_than(self.result, self.start, by_loss=self._by_loss):
            self.result, self._best = evaluated, self._copies()
        elif evaluated.calls_for_rollback(self._previous, self.start, by_loss=self._by_loss):
            self.rollbacks += 1
            self._restart = number
            self._assign(self._best)
            self._optimizer = self._adam()
        self._previous = evaluated

    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam([
            {"params": [p], "factor": factor}
            for p, factor in zip(self._parameters, self._factors, strict=True)
        ])  # fmt: skip

    @torch.no_grad()
    def _caution(self) -> float:
        """Share of the learning rate that the sites of the initial student need.

        Steps that bring a LayerNorm nearer throw off a network that is nearly right: docs/distillation.md.
        """
        if not self._sites or not self._batches:
            return 1.0
        total = 0.0
        for rows in self._pieces(self._batches[0]):
            self._targets.load(rows)
            with self._sites.comparing():
                run(self._student, self._samples.inputs(rows.tolist()), "a batch for the student")
            distance = self._sites.distance()
            total += math.inf if distance is None else float(distance) * len(rows)
        return min(1.0, total / len(self._batches[0]) / _FAR) if math.isfinite(total) else 1.0

    def _factor(self, parameter: Tensor) -> float:
        """Of its learning rate: what an optimizer step changes is the same share of every parameter."""
        if not self._sites:
            return 1.0
        least = _LEAST_SIZES[parameter.ndim > 1]
        return max(least, float(parameter.detach().square().mean().sqrt())) / _SIZE

    def _rate(self) -> float:
        """Learning rate of the next step."""
        total = len(self._batches)
        warm_up = min(WARM_UP * total, _MOST_WARM_UP)
        share = rate_share(self.step, total, warm_up=warm_up, restart=self._restart)
        return self._lr * BACKOFF**self.rollbacks * share

    def _add_gradients(self, rows: Tensor) -> Tensor:
        """Adds the gradients of the loss on the samples `rows`; returns the loss."""
        losses = []
        for part in self._pieces(rows):
            loss = self._training_loss(part) * (len(part) / len(rows))
            if not loss.requires_grad:
                raise ConfigError("the loss does not depend on any parameter that requires gradients")
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _pieces(self, rows: Tensor) -> tuple[Tensor, ...]:
        """`rows` in parts that run one after another: of large images few at a time take less time."""
        if not self._sites or self._by_loss:  # a loss may depend on the whole batch
            return (rows,)
        values = sum(x.numel() for x in self._samples.inputs(rows[:1].tolist()).tensors())
        return torch.chunk(rows, min(len(rows), -(-values * len(rows) // _PIECE)))

    def _training_loss(self, rows: Tensor) -> Tensor:
        if not self._sites:
            return self._loss_on(rows)[0]
        self._targets.load(rows)
        with self._sites.comparing():
            loss = self._loss_on(rows)[0]
        distance = self._sites.distance()
        if distance is None:
            return loss
        return self._output_share / (abs(self.start.loss) or 1.0) * loss + distance

    def _loss_on(self, rows: Tensor) -> tuple[Tensor, Any, Any]:
        """Loss on the samples `rows`, and the outputs of the student and the teacher."""
        numbers = rows.tolist()
        expected = self._teacher(numbers)
        outputs = run(self._student, self._samples.inputs(numbers), "a batch for the student")
        loss = self._loss(outputs, expected)
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
            raise ConfigError("the loss function must return one floating-point number, as a tensor")
        return loss, outputs, expected

    @torch.no_grad()
    def _evaluate(self) -> EvalResult:
        results, kept = [], []
        for rows in self._held_out:
            loss, outputs, expected = self._loss_on(rows)
            kept += [outputs] if self._metric else []
            maps = self._logits == "auto" and not self._by_loss
            results.append(
                EvalResult(
                    self.step,
                    float(loss),
                    agreement(outputs, expected, self._logits),
                    divergence(outputs, expected, self._logits),
                    distance(outputs, expected, self._logits),
                    distance(outputs, expected, "all") if maps else 0.0,
                )
            )
        metric = None if self._metric is None else self._metric.value(kept, self._held_out)
        mean = mean_result(results, [len(rows) for rows in self._held_out])
        return dataclasses.replace(mean, metric=metric)

    def _copies(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def _assign(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def state(self) -> dict[str, Any]:
        """Everything that changes from step to step."""
        return {
            "step": self.step,
            "parameters": [p.detach() for p in self._parameters],
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
            "start": dataclasses.astuple(self.start),
            "result": dataclasses.astuple(self.result),
            "previous": dataclasses.astuple(self._previous),
            "restart": self._restart,
            "rollbacks": self.rollbacks,
            "seconds": self.seconds,
            "stopped": self.stopped,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned in an earlier run of the same training."""
        self._assign(state["parameters"])
        self._best = [value.to(p.device) for value, p in zip(state["best"], self._parameters, strict=True)]
        self._optimizer.load_state_dict(state["optimizer"])
        own = self.start  # the file may come from another loss, or metric, with equal values
        self.start, self.result = EvalResult(*state["start"]), EvalResult(*state["result"])
        self._previous, self._restart = EvalResult(*state["previous"]), state["restart"]
        self.start = dataclasses.replace(self.start, watched=own.watched, metric=own.metric)
        self.step, self.rollbacks = state["step"], state["rollbacks"]
        self.seconds, self.stopped = state["seconds"], state["stopped"]


class Checkpoint:
    """The file that a trainer saves its state to.

    Raises:
        ExportError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        from pn_compiler.base.files import check_writable  # onnx is only imported when it is needed

        check_writable(path)
        self._path = path
        self._identity: dict[str, Any] = {}
        self._saved = time.monotonic()

    def resume(self, trainer: Trainer, identity: Mapping[str, Any]) -> None:
        """Restores `trainer` from the file, if there is one.

        Args:
            trainer: before its first step.
            identity: what identifies this training; name -> a number or text.

        Raises:
            ConfigError: the file belongs to another training.
            LoadError: it cannot be read.
        """
        self._identity = dict(identity)
        if not self._path.exists():
            return
        stored = self._read()
        other = [name for name, value in identity.items() if stored["identity"].get(name) != value]
        if other:
            raise ConfigError(
                f"{self._path} is the checkpoint of another distillation, which differs in "
                f"{', '.join(other)}: give the same, or another file"
            )
        if not math.isclose(stored["start"][1], trainer.start.loss, rel_tol=1e-3, abs_tol=1e-9):
            raise ConfigError(
                f"{self._path} is the checkpoint of another distillation: its loss began at "
                f"{stored['start'][1]:.4g}, here it is {trainer.start.loss:.4g}"
            )
        trainer.load_state(stored)

    def _read(self) -> dict[str, Any]:
        try:
            stored: Any = torch.load(self._path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise LoadError(f"cannot read {self._path}: {error.strerror or error}") from error
        except Exception as error:  # a damaged file can raise anything
            raise LoadError(f"{self._path} is damaged or no checkpoint: remove it to start over") from error
        if not isinstance(stored, dict) or stored.get("kind") != _KIND:
            raise LoadError(f"{self._path} is no checkpoint of a distillation: give another file")
        if stored.pop("digest", "") != _digest(stored):  # torch.load does not check
            raise LoadError(f"{self._path} is damaged: remove it to start over")
        return stored

    def save(self, trainer: Trainer, *, last: bool) -> None:
        """Writes the file on the last call, or if a few seconds have passed."""
        from pn_compiler.base.files import write_atomically

        if last or time.monotonic() - self._saved >= SAVE_EVERY:
            content = io.BytesIO()
            stored = {"kind": _KIND, "identity": self._identity, **trainer.state()}
            torch.save({**stored, "digest": _digest(stored)}, content)
            write_atomically(self._path, content.getvalue())
            self._saved = time.monotonic()


def _digest(stored: Mapping[str, Any]) -> str:
    """Of all values and of the names that they have."""
    leaves, structure = pytree.tree_flatten(dict(stored))
    return digest([str(structure), *leaves])
