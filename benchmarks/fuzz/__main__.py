"""Random networks against everything that their conversion should equal.

    python -m benchmarks.fuzz --models 10000
    python -m benchmarks.fuzz --model 4711        # that network alone, and the smallest that fails as it does

Prints how many networks fail by cause, and the smallest network for each. Exit status 1 if any computes
something else than it should, or ends in an error that is not pn_compiler's own. docs/fuzzing.md explains it.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from benchmarks.fuzz.campaign import BY_DESIGN, FAILURES, Finding, Hunt, Tally, campaign
from benchmarks.fuzz.generate import generate
from benchmarks.fuzz.oracles import check
from benchmarks.fuzz.program import Program, source
from pn_compiler.base.diagnostics import CODES
from pn_compiler.base.tables import format_table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--models", type=int, default=10_000, help="how many networks (default 10000)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first network; the others follow (default 0)"
    )
    parser.add_argument("--model", type=int, metavar="SEED", help="check the network of this seed alone")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no more networks after this time"
    )
    parser.add_argument(
        "--onnx-share", type=float, default=0.05, help="share that is exported, too (default 0.05)"
    )
    args = parser.parse_args(argv)
    if args.model is not None:
        return check_one(args.model, onnx=args.onnx_share > 0)
    start = time.monotonic()
    with tqdm(total=args.models, unit="network", disable=None) as bar:

        def progress(tally: Tally) -> None:
            bar.set_postfix(failures=tally.failures, causes=len(tally.findings), refresh=False)
            bar.update(tally.outcomes.total() - bar.n)

        tally = campaign(
            range(args.seed, args.seed + args.models),
            jobs=args.jobs,
            seconds=args.seconds,
            onnx_share=args.onnx_share,
            progress=progress,
        )
    print(report(tally))
    print(f"\n{time.monotonic() - start:.0f} s")
    return int(tally.failures > 0)


def check_one(seed: int, *, onnx: bool) -> int:
    """Prints the network of `seed`, what became of it, and the smallest that fails as it does."""
    torch.set_num_threads(1)
    program = generate(seed)
    verdict = check(program, onnx=onnx)
    print(runnable(program))
    print(f"# {verdict.outcome}: {verdict.cause}\n{verdict.detail}")
    if verdict.outcome in ("ok", "invalid"):
        return 0
    (finding,) = Hunt(onnx_share=float(onnx)).run([seed]).findings.values()
    print(f"\n# the smallest that fails as it does\n{runnable(finding.program)}")
    return int(verdict.outcome in FAILURES)


def report(tally: Tally) -> str:
    """The counts by outcome and cause, the codes of refusals, and the smallest networks."""
    total = max(tally.models, 1)
    named = ("ok", "wrong", "crash", "refused", "unexportable")
    outcomes = ", ".join(f"{tally.outcomes[name]} {name}" for name in named)
    parts = [f"{tally.models} networks: {outcomes} ({tally.outcomes['invalid']} more were unfit)"]
    found = sorted(tally.findings.items(), key=lambda item: -item[1].count)
    if found:
        rows = [(str(f.count), f"{100 * f.count / total:.2f} %", str(f.seed), key) for key, f in found]
        parts.append(format_table(("networks", "share", "first seed", "cause"), rows))
    if tally.codes:
        codes = [
            (
                code,
                str(n),
                f"{100 * n / total:.2f} %",
                "by design" if code in BY_DESIGN else "",
                CODES[code][1],
            )
            for code, n in tally.codes.most_common()
        ]
        parts.append(format_table(("warning", "networks", "share", "", "meaning"), codes))
    parts += [describe(key, finding) for key, finding in found]
    return "\n\n".join(parts)


def describe(key: str, finding: Finding) -> str:
    last = (finding.verdict.detail.strip().splitlines() or [""])[-1]
    return f"# {key}\n# seed {finding.seed}, {last}\n{runnable(finding.program)}"


class _Code(str):
    """Source, which stands without quotes in the repr of what holds it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def runnable(program: Program) -> str:
    """Source that converts the network as the oracles do."""
    drawn = tuple(_Code(f"torch.randn{shape}") for _, shape in program.inputs)
    options = ", ".join(f"{k}={v!r}" for k, v in program.options.for_transform().items() if v is not None)
    mode = "" if not program.options.training else ".train()"
    lines = [
        source(program),
        "from benchmarks.fuzz.build import initialise",
        "import pn_compiler",
        f"torch.manual_seed({program.seed})",
        f"torch.set_default_dtype(torch.{program.options.dtype})",
        f"model = initialise(Net(), {program.seed}, {program.options.gain}){mode}",
        f"inputs = {program.arguments(drawn)}",
        f"converted = pn_compiler.transform(model, {'inputs, ' if program.options.example else ''}{options})",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
