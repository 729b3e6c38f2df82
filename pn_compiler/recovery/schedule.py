"""The learning rate over the steps of a training."""

import math


def rate_share(step: int, steps: int, *, warm_up: float, restart: int = 0) -> float:
    """Share of the highest learning rate: a linear rise, as Adam's first steps are the longest, and a cosine.

    Args:
        step: 0 is the first.
        steps: of the whole training, at whose end the share is 0.
        warm_up: steps in which it rises.
        restart: the step at which it rises anew.
    """
    rise = min(1.0, (step - restart + 1) / max(1.0, warm_up))
    return rise * (1 + math.cos(math.pi * step / steps)) / 2
