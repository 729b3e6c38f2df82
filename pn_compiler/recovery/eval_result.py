"""How well a student does on the held-out samples, and which of two states is better."""

import dataclasses
import operator
from collections.abc import Sequence

FAR_WORSE = 2.0  # times the initial distance or loss


@dataclasses.dataclass(frozen=True, slots=True)
class EvalResult:
    """How well the student does on the held-out samples.

    Attributes:
        step: the step after which it was evaluated.
        loss: mean over the samples of the loss that is trained on.
        agreement: share of samples, or of their pixels, where student and teacher predict the same class;
            None without logits.
        divergence: that of the logits in nats, at temperature 1; None without logits.
        distance: the divergence, and the relative L2 distance of outputs that are not logits.
        watched: the distance with maps that may hold logits taken for logits; 0 if it is said what they are.
        metric: the user's, higher is better; None without one. It decides first.
    """

    step: int
    loss: float
    agreement: float | None
    divergence: float | None
    distance: float
    watched: float
    metric: float | None = None

    def better_than(self, best: "EvalResult", start: "EvalResult", *, by_loss: bool) -> bool:
        """Whether it replaces the best one so far: nearer to the teacher, and in no respect below the start.

        Args:
            best, start: the best evaluation, and the initial one.
            by_loss: whether the loss decides alone, as the user's own does.
        """
        if self.metric is not None and best.metric is not None and self.metric != best.metric:
            return self.metric > best.metric
        if by_loss:
            return self.loss < best.loss
        if self.agreement is not None and start.agreement is not None and self.agreement < start.agreement:
            return False
        return self.distance < best.distance and self.watched <= start.watched

    def calls_for_rollback(self, previous: "EvalResult", start: "EvalResult", *, by_loss: bool) -> bool:
        """Whether the steps were too long: far worse than the start, or worse twice without recovering.

        While the learning rate is high, a network that learns may be a little worse than at the start for a
        while; it is better again before the end.

        Args:
            previous, start: the evaluation before, and the initial one.
            by_loss: as in `better_than`.
        """
        if not self._worse_than(start, by_loss=by_loss):
            return False
        if self._far_worse_than(start, by_loss=by_loss):
            return True
        recovers = not self._worse_than(previous, by_loss=by_loss)
        return previous._worse_than(start, by_loss=by_loss) and not recovers

    def _worse_than(self, other: "EvalResult", *, by_loss: bool) -> bool:
        """Whether it is farther from the teacher, which a few samples of another class do not show."""
        if self.metric is not None and other.metric is not None:
            return not self.metric >= other.metric  # nan is worse, too
        if by_loss:
            return self.loss > other.loss
        return self.distance > other.distance or self.watched > other.watched

    def _far_worse_than(self, start: "EvalResult", *, by_loss: bool) -> bool:
        if self.metric is not None:  # one point less is as bad as many
            return True
        if by_loss:
            return self.loss > start.loss + (FAR_WORSE - 1) * abs(start.loss)  # it may be negative
        return self.distance > FAR_WORSE * start.distance or self.watched > FAR_WORSE * start.watched


def mean_result(results: Sequence[EvalResult], sizes: Sequence[int]) -> EvalResult:
    """The mean over batches of these sizes; what is None in one of them is None."""
    columns = zip(*map(dataclasses.astuple, results), strict=True)
    means = [
        None if None in column else sum(map(operator.mul, column, sizes)) / sum(sizes) for column in columns
    ]
    return EvalResult(results[0].step, *means[1:])  # type: ignore[arg-type]  # only two can be None
