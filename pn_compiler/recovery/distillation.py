"""Short label-free fine-tuning of a converted network to match the BatchNorm network's outputs."""

import dataclasses
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pn_compiler.base.config import DistillConfig, Logits, MetricFunction
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import check_function, check_path
from pn_compiler.base.options import pick
from pn_compiler.base.strict_json import to_json
from pn_compiler.data.metric import Metric
from pn_compiler.data.samples import Outputs, Samples, digest
from pn_compiler.recovery.memory_layout import channels_last
from pn_compiler.recovery.site_matching import SiteMatching
from pn_compiler.recovery.trainer import Checkpoint, Loss, Trainer
from pn_compiler.running.copying import copy_model, unwrap
from pn_compiler.running.evaluation import untouched
from pn_compiler.running.losses import floating_outputs, output_loss, readings


@dataclasses.dataclass(frozen=True, slots=True)
class DistillReport:
    """What `pn_compiler.distill` did; ``str`` of it is for people, ``to_json()`` for machines.

    Attributes:
        steps: number of steps taken.
        best_step: the step whose state is returned; 0 is the original model.
        loss_before, loss_after: loss of the outputs of the original model and of the result, on the held-out
            samples.
        agreement_before, agreement_after: share of held-out samples, or of their pixels, where the model and
            the teacher predict the same class, from 0 to 1; None if no output is treated as logits.
        divergence_before, divergence_after: KL divergence from the teacher in nats, on the held-out samples;
            None if no output is treated as logits.
        outputs: place of each floating-point output -> what it is treated as, in words.
        rollbacks: how often the model became worse than the original, so that training rolled back to its
            best state and continued at a quarter of the learning rate.
        training, held_out: number of samples.
        unit: "samples", or "batches" if batches could not be split: then batches are counted.
        seconds: total time, including the steps of earlier runs if it was resumed.
        stopped: why it stopped early, or "".
        metric: name of the user's metric, or "".
        metric_before, metric_after: its value for the original model and for the result.
    """

    steps: int
    best_step: int
    loss_before: float
    loss_after: float
    agreement_before: float | None
    agreement_after: float | None
    divergence_before: float | None
    divergence_after: float | None
    outputs: dict[str, str]
    rollbacks: int
    training: int
    held_out: int
    unit: str
    seconds: float
    stopped: str = ""
    metric: str = ""
    metric_before: float | None = None
    metric_after: float | None = None

    def to_json(self) -> str:
        return to_json(dataclasses.asdict(self))

    def __str__(self) -> str:
        best = f"step {self.best_step}" if self.best_step else "the original model"
        lines = [
            f"{self.steps} steps on {self.training} {self.unit} in {self.seconds:.1f} s; the best is {best}",
            f"on {self.held_out} held-out {self.unit}: loss {self.loss_before:.4g} -> {self.loss_after:.4g}",
        ]
        if self.agreement_before is not None and self.agreement_after is not None:
            shares = f"{100 * self.agreement_before:.1f} % -> {100 * self.agreement_after:.1f} %"
            lines[1] += f", the teacher's class {shares}"
        if self.divergence_before is not None and self.divergence_after is not None:
            lines[1] += f", KL divergence {self.divergence_before:.2g} -> {self.divergence_after:.2g} nats"
        if self.metric_before is not None and self.metric_after is not None:
            lines[1] += f", {self.metric} {self.metric_before:.6g} -> {self.metric_after:.6g}"
        if self.rollbacks:
            lines.append(
                f"rolled back to its best state and lowered the learning rate {self.rollbacks} times"
            )
        lines += [f"{place} is taken for {what}" for place, what in self.outputs.items()]
        return "\n".join([*lines, *([f"stopped: {self.stopped}"] if self.stopped else [])])


@torch.inference_mode(False)  # whatever the caller's mode: there are gradients
def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: Any,
    *,
    steps: int = DistillConfig.steps,
    batch_size: int = DistillConfig.batch_size,
    lr: float = DistillConfig.lr,
    seed: int = DistillConfig.seed,
    max_samples: int = DistillConfig.max_samples,
    held_out: float = DistillConfig.held_out,
    logits: Logits = DistillConfig.logits,
    metric: str | MetricFunction | None = DistillConfig.metric,
    loss: Loss | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> tuple[nn.Module, DistillReport]:
    """Trains a copy of `model` for a few steps to match the outputs of `teacher`. It needs no labels.

    Where `model` was converted from `teacher`, it learns what the BatchNorms give, on the inputs that the
    normalizers have in the running model: a few hundred samples have too few outputs to learn from. The more
    outputs there are for each parameter, the more they count; for any other model they are all there is.

    The optimizer is Adam without weight decay, on all parameters that require gradients. Both networks run in
    eval mode, because that is the function that will be used: without dropout or stochastic depth. Before the
    first step, after every 25th and after the last one, the model is compared with the teacher on held-out
    samples. The result is the state with the lowest distance, which may be the initial one: for logits the
    KL divergence (at temperature 1), and only if no fewer samples than at the beginning have the teacher's
    class; for other outputs the relative L2 distance. If the distance rises to twice its initial value, or
    exceeds that value at two evaluations in a row without falling, training rolls back to the best state and
    continues at a quarter of the learning rate. A loss or gradient that is nan or infinite stops the
    training.

    The first `max_samples` samples of `batches` are held in memory, up to 1 GB. A random part of them is held
    out; the rest are shuffled into batches of `batch_size`, again and again. So `batches` is read only once,
    and with random augmentation each sample keeps the augmentation that it drew. If the data are sorted, pass
    a loader that shuffles. Batches that cannot be split into samples are used whole, one a step: images of
    different sizes, lists of images, outputs for the whole batch. The teacher's outputs are held as well, up
    to 256 MB; beyond that, the teacher runs in each step.

    Args:
        model: a result of `transform`, or any module with float32 or float64 parameters. It is left
            untouched.
        teacher: the network that was converted, or any other with the same outputs. It is left untouched.
        batches: an iterable of batches, such as a DataLoader or a list, or one tensor; as for `diagnose`.
        steps: number of optimizer steps; 0 only measures.
        batch_size: samples per step.
        lr: Adam's highest learning rate. It rises in the first tenth of the steps, at most 20, and falls to
            zero along a cosine. If there are BatchNorms to learn from, it is that of a parameter with a root
            mean square of 0.1; others have theirs in proportion, so that all change by the same share. A
            model that is nearly right at the start has lower ones: docs/distillation.md.
        seed: for the held-out split, the order of samples, and torch's random numbers while the batches are
            read. On a CPU with the same number of threads the result is bit-for-bit the same; torch's own
            random state is left as it was.
        max_samples: the most samples to use, including the held-out ones.
        held_out: share of the samples that is never trained on, above 0 and below 1.
        logits: which floating-point outputs hold the logits of K > 1 classes along their dim 1. "all": those
            of shape [N, K] and [N, K, *S]; use it for a segmentation network. "none": they are values, such
            as embeddings. "auto": those of shape [N, K]; those of shape [N, K, *S] count as values, but a
            state whose divergence as logits is worse than the initial one is not kept.
        metric: (outputs, labels) -> a number, higher is better; or its name, ``package.module:function``,
            which is imported. Batches are then (inputs, labels). It decides instead of the distance: the
            result is the state with the highest metric on the held-out samples, of equal ones the nearest to
            the teacher, and training rolls back where it falls below the initial one. It is called as by
            `freeze_statistics`; nothing is trained on labels.
        loss: (model's outputs, teacher's outputs) -> scalar, instead of `output_loss`. It also decides which
            state is kept; `logits` then only selects what agreement and divergence compare.
        checkpoint: a file that is written every few seconds. A later call with the same arguments resumes
            from there, with a bit-for-bit identical result. It is kept at the end.

    Returns:
        (the trained copy in the mode of `model`, the report).

    Raises:
        ConfigError: an impossible option; too few samples; models or samples that do not fit; values that
            are nan or infinite before the first step; the checkpoint belongs to another run.
        LoadError: the checkpoint is damaged.
        ExportError: the checkpoint cannot be written.
        UnsupportedModelError: the model cannot be copied.
    """
    config = pick(DistillConfig, locals())
    began = time.monotonic()
    check_function("loss", loss)
    if checkpoint is not None:
        check_path("checkpoint", checkpoint)
    file = None if checkpoint is None else Checkpoint(Path(checkpoint))
    student, teacher = copy_model(unwrap(model)), unwrap(teacher)
    _refuse(student)
    with channels_last(teacher, student), untouched(teacher), untouched(student):
        torch.manual_seed(seed)
        samples = Samples.read(batches, teacher, max_samples, labelled=metric is not None)
        measure = None if metric is None else Metric(metric, samples)
        expected = Outputs(teacher, samples, 1 if samples.whole else batch_size)
        outputs = readings(expected([0]), logits)
        generator = torch.Generator().manual_seed(seed)
        held, train = samples.divide(held_out, generator)
        size = 1 if samples.whole else min(batch_size, len(train))
        trainer = Trainer(
            student, expected, samples, loss or functools.partial(output_loss, logits=logits),
            by_loss=loss is not None, metric=measure, sites=SiteMatching(student, teacher),
            output_share=_output_share(student, expected([0]), len(train)), lr=lr, logits=logits, seed=seed,
            batches=_order(train, steps, size, generator), held_out=torch.split(held, size),
        )  # fmt: skip
        if file is not None:
            values = {"samples": samples.digest(), "model": _digest(student), "teacher": _digest(teacher)}
            values["metric"] = "" if measure is None else measure.name
            file.resume(trainer, {**dataclasses.asdict(config), **values})
        prepared = time.monotonic()
        trainer.train(file)
    result = trainer.result
    return student, DistillReport(
        steps=trainer.step, best_step=result.step, loss_before=trainer.start.loss, loss_after=result.loss,
        agreement_before=trainer.start.agreement, agreement_after=result.agreement,
        divergence_before=trainer.start.divergence, divergence_after=result.divergence,
        outputs=outputs, rollbacks=trainer.rollbacks,
        training=len(train), held_out=len(held), unit="batches" if samples.whole else "samples",
        seconds=prepared - began + trainer.seconds, stopped=trainer.stopped,
        metric="" if measure is None else measure.name,
        metric_before=trainer.start.metric, metric_after=result.metric,
    )  # fmt: skip


def _refuse(student: nn.Module) -> None:
    """Raises ConfigError if `student` cannot be trained."""
    trainable = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if not trainable:
        raise ConfigError("no parameter of the model requires a gradient: distill it before it is folded")
    narrow = [name for name, p in trainable.items() if p.dtype not in (torch.float32, torch.float64)]
    if narrow:
        raise ConfigError(
            f"{narrow[0]} is {str(trainable[narrow[0]].dtype).removeprefix('torch.')}, too coarse for small "
            "steps: distill the model and its teacher in float32 (model.float()), and convert the result"
        )


def _output_share(student: nn.Module, output: Any, samples: int) -> float:
    """Weight of the outputs' loss beside that of the sites: (output values / parameters)^2, from 0.01 to 1.

    With fewer values than parameters, training learns the outputs of these samples by heart, and those of
    others become worse: docs/distillation.md.

    Args:
        output: the teacher's, for one sample.
        samples: how many are trained on.
    """
    values = samples * sum(tensor.numel() for tensor in floating_outputs(output).values())
    parameters = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return min(1.0, max(0.1, values / parameters)) ** 2


def _order(rows: Tensor, steps: int, size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """The `size` rows of each step, from repeated random permutations of `rows`."""
    rounds = -(-steps * size // len(rows))
    orders = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(rounds)]
    return torch.cat([*orders, rows[:0]])[: steps * size].reshape(steps, size).unbind()


def _digest(model: nn.Module) -> str:
    return digest(value for pair in model.state_dict().items() for value in pair)
