"""Many random networks: how many fail, for which causes, and the smallest network for each."""

import collections
import contextlib
import dataclasses
import itertools
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from benchmarks.fuzz.generate import generate
from benchmarks.fuzz.oracles import COMPARISONS, Verdict, check
from benchmarks.fuzz.program import CONTEXTS, Program, block_kind
from benchmarks.fuzz.shrink import shrink

FAILURES = ("wrong", "crash")
_MOST_SHRUNK = 40  # networks of one cause that are made smaller; later ones are only counted
_SHRINKING = 10.0  # seconds for one network

#: codes that some generated networks must give: dead code, no running statistics, [N, C] and single channels
BY_DESIGN = frozenset({"PN102", "PN104", "PN107", "PN205", "PN206"})


@dataclasses.dataclass(slots=True)
class Finding:
    """Networks that fail for one cause: how many, and the smallest known one."""

    verdict: Verdict
    program: Program
    seed: int
    count: int = 1

    @property
    def key(self) -> str:
        """The cause; for differences, with what the smallest network consists of."""
        compared = self.verdict.cause in COMPARISONS
        parts = sorted(features(self.program)) if compared else []
        return f"{self.verdict.outcome}: {self.verdict.cause}" + (f" [{'; '.join(parts)}]" if parts else "")


@dataclasses.dataclass(slots=True)
class Tally:
    """What became of the networks so far."""

    outcomes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    codes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    findings: dict[str, Finding] = dataclasses.field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        self.outcomes += other.outcomes
        self.codes += other.codes
        for key, finding in other.findings.items():
            known = self.findings.setdefault(key, dataclasses.replace(finding, count=0))
            known.count += finding.count

    @property
    def models(self) -> int:
        return self.outcomes.total() - self.outcomes["invalid"]

    @property
    def failures(self) -> int:
        return sum(self.outcomes[outcome] for outcome in FAILURES)


def features(program: Program) -> frozenset[str]:
    """What a program consists of, without names and numbers."""
    declared = dict(program.declarations)
    found = set()
    for statement in program.statements:
        classes = {c for m in statement.modules for c in re.findall(r"[A-Z]\w*(?=\()", declared[m])}
        form = "" if statement.template == "$o = self.$m($a)" else statement.template
        text = " ".join([statement.kind, *sorted(classes), form])
        found.add(re.sub(r"\d+(\.\d+)?", "N", text).replace("\n", " | ").strip())
        if block_kind(statement.block) in CONTEXTS:
            found.add(block_kind(statement.block))
    return frozenset(found)


class Hunt:
    """Checks networks one after the other; makes the first of each cause small, and counts those like it."""

    def __init__(self, *, onnx_share: float = 0.0, shrinking: float = _SHRINKING) -> None:
        self.onnx_share, self.shrinking = onnx_share, shrinking
        self.known: dict[str, list[Finding]] = {}  # by outcome and cause

    def run(self, seeds: Iterable[int], *, until: float = float("inf")) -> Tally:
        """Checks the networks of `seeds`; begins none when `time.time()` is behind `until`."""
        torch.set_num_threads(1)
        tally = Tally()
        for seed in itertools.takewhile(lambda _: time.time() < until, seeds):
            program = generate(seed)
            verdict, onnx = check(program), False
            if verdict.outcome == "ok" and random.Random(f"onnx {seed}").random() < self.onnx_share:
                verdict, onnx = check(program, onnx=True), True
            tally.outcomes[verdict.outcome] += 1
            tally.codes.update(verdict.codes)
            if verdict.outcome not in ("ok", "invalid"):
                found = self._finding(program, verdict, onnx=onnx)
                tally.add(Tally(findings={found.key: dataclasses.replace(found, count=1)}))
        return tally

    def _finding(self, program: Program, verdict: Verdict, *, onnx: bool) -> Finding:
        """The known cause of this failure, or a new one with the smallest network for it."""
        known = self.known.setdefault(f"{verdict.outcome} {verdict.cause}", [])
        parts = features(program)
        for finding in known:
            if verdict.cause not in COMPARISONS or features(finding.program) <= parts:
                return finding
        if len(known) >= _MOST_SHRUNK:
            return known[-1]

        def fails(candidate: Program) -> bool:
            found = check(candidate, onnx=onnx)
            return (found.outcome, found.cause) == (verdict.outcome, verdict.cause)

        smallest = shrink(program, fails, seconds=self.shrinking)
        known.append(Finding(check(smallest, onnx=onnx), smallest, program.seed))
        return known[-1]


_hunt: Hunt | None = None  # one in each process, so that a cause is made small once in each


def _run(seed: int, onnx_share: float, until: float) -> Tally:
    global _hunt  # noqa: PLW0603
    logging.disable()  # torch.export's
    _hunt = _hunt or Hunt(onnx_share=onnx_share)
    return _hunt.run([seed], until=until)


def campaign(
    seeds: range,
    *,
    jobs: int = 1,
    seconds: float = float("inf"),
    onnx_share: float = 0.0,
    progress: Callable[[Tally], object] = lambda tally: None,
) -> Tally:
    """Checks the networks of `seeds` in `jobs` processes; begins no more behind `seconds` or Ctrl-C."""
    until, total, left = time.time() + seconds, Tally(), iter(seeds)
    with contextlib.suppress(KeyboardInterrupt):  # what is known by then is worth its print
        while suspects := _run_pool(left, jobs, until, onnx_share, total, progress):
            for seed in suspects:  # one of them ended its process: which, each shows in a process of its own
                alone = _run_pool(iter([seed]), 1, until, onnx_share, total, progress)
                total.add(_died(seed) if alone else Tally())
    return total


def _run_pool(
    seeds: Iterator[int],
    jobs: int,
    until: float,
    onnx_share: float,
    total: Tally,
    progress: Callable[[Tally], object],
) -> list[int]:
    """Adds the networks of `seeds` to `total`; returns those that were running when a process died."""
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        running: dict[Future[Tally], int] = {}
        while True:
            if time.time() < until:
                for seed in itertools.islice(seeds, 2 * jobs - len(running)):
                    running[pool.submit(_run, seed, onnx_share, until)] = seed
            if not running:
                return []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                if isinstance(future.exception(), BrokenProcessPool):
                    return list(running.values())
                total.add(future.result())
                del running[future]
                progress(total)


def _died(seed: int) -> Tally:
    """The record of a network whose check ended its process."""
    verdict = Verdict("crash", "the process died")
    return Tally(
        collections.Counter(crash=1),
        findings={"crash: the process died": Finding(verdict, generate(seed), seed)},
    )
