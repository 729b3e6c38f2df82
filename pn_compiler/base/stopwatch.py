"""The stages of a run: announced as they begin, timed as they end."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Stopwatch:
    """Announces each stage to `progress`, and adds up its seconds.

    ``with stopwatch("trace"): ...`` is a stage; a stage that comes again adds to its seconds.
    """

    def __init__(self, progress: Callable[[str], None] | None = None) -> None:
        self.announce = progress or (lambda stage: None)
        self._seconds: dict[str, float] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Duration of each stage that has ended, in their order; a copy."""
        return dict(self._seconds)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.announce(stage)
        start = time.perf_counter()
        yield
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start
