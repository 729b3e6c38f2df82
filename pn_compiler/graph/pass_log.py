"""A log of the passes that ran, for reports; none is kept unless it is asked for."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True, slots=True)
class PassRun:
    """What a pass did to one graph.

    Attributes:
        stage: what it was part of: "prepare", "convert", "fold", "freeze" or "narrow".
        name: of its class.
        about: the first line of what its class says of itself.
        rewritten: how many places changed.
        seconds: how long it took.
    """

    stage: str
    name: str
    about: str
    rewritten: int
    seconds: float


_log: contextvars.ContextVar[list[PassRun] | None] = contextvars.ContextVar("log", default=None)
_stage: contextvars.ContextVar[str] = contextvars.ContextVar("stage", default="")


@contextlib.contextmanager
def pass_log() -> Iterator[list[PassRun]]:
    """Logs the passes of the stages within the block to the list that it gets."""
    runs: list[PassRun] = []
    token = _log.set(runs)
    try:
        yield runs
    finally:
        _log.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """What runs within the block belongs to the result; what is only tried, outside of one, does not."""
    token = _stage.set(name)
    try:
        yield
    finally:
        _stage.reset(token)


def log_pass(name: str, about: str, rewritten: int, seconds: float) -> None:
    """Notes a pass that has run, if there is a log and a stage."""
    runs, current = _log.get(), _stage.get()
    if runs is not None and current:
        runs.append(PassRun(current, name, about, rewritten, seconds))


def summed(runs: Iterable[PassRun]) -> list[PassRun]:
    """One entry for each pass of a stage, over all graphs that it ran on, in the order of the first."""
    found: dict[tuple[str, str], PassRun] = {}
    for run in runs:
        key = run.stage, run.name
        earlier = found.get(key, dataclasses.replace(run, rewritten=0, seconds=0.0))
        rewritten, seconds = earlier.rewritten + run.rewritten, earlier.seconds + run.seconds
        found[key] = dataclasses.replace(run, rewritten=rewritten, seconds=seconds)
    return list(found.values())
