"""The smallest program that fails for the same cause."""

import dataclasses
import time
from collections.abc import Callable, Iterator

from benchmarks.fuzz.program import Options, Program, Statement

Fails = Callable[[Program], bool]


def shrink(program: Program, fails: Fails, *, seconds: float = 20.0) -> Program:
    """Makes `program` smaller as long as it `fails`, for at most about `seconds`.

    Each round tries every way to make it smaller; the first that still fails is taken.
    """
    until = time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for candidate in _candidates(program):
            if time.monotonic() > until:
                return program
            if fails(candidate):
                program, smaller = candidate, True
                break
    return program


def _candidates(program: Program) -> Iterator[Program]:
    """Smaller programs, those with the largest step first. Some do not run."""
    yield from _without_ranges(program)
    for index in range(len(program.statements) - 1, -1, -1):
        yield from _without(program, index)
    yield from _simpler_results(program)
    if len(program.inputs) > 1:
        used = {v for s in program.statements for v in s.operands} | set(program.returned)
        for name, _ in program.inputs:
            if name not in used:
                yield dataclasses.replace(program, inputs=tuple(i for i in program.inputs if i[0] != name))
    if program.signature != "plain":
        yield dataclasses.replace(program, signature="plain")
    for label in {s.block for s in program.statements} - {""}:
        moved = (dataclasses.replace(s, block="") if s.block == label else s for s in program.statements)
        yield dataclasses.replace(program, statements=tuple(moved))
    default = Options()
    for field in dataclasses.fields(Options):
        value = getattr(default, field.name)
        if getattr(program.options, field.name) != value:
            yield dataclasses.replace(
                program, options=dataclasses.replace(program.options, **{field.name: value})
            )


def _without_ranges(program: Program) -> Iterator[Program]:
    """Halves, quarters, ... of the statements left out, where their last result is read no more."""
    size = len(program.statements) // 2
    while size > 1:
        for start in range(0, len(program.statements) - size + 1, size):
            rest = program.statements[:start] + program.statements[start + size :]
            gone = {v for s in program.statements[start : start + size] for v in s.results}
            before = [v for s in program.statements[:start] for v in s.results] or [program.inputs[0][0]]
            yield _renamed(dataclasses.replace(program, statements=rest), dict.fromkeys(gone, before[-1]))
        size //= 2


def _without(program: Program, index: int) -> Iterator[Program]:
    """The statement at `index` left out, and one of its operands read instead of its results."""
    gone = program.statements[index]
    rest = program.statements[:index] + program.statements[index + 1 :]
    smaller = dataclasses.replace(program, statements=rest)
    for operand in dict.fromkeys(gone.operands):
        yield _renamed(smaller, dict.fromkeys(gone.results, operand))
        if not gone.results:
            return
    shape, inputs = dict(program.shapes).get("".join(gone.results)), dict(program.inputs)
    for operand in set(gone.operands) & set(inputs) if shape else ():  # an input of the shape of the result
        started = dataclasses.replace(smaller, inputs=tuple((inputs | {operand: shape}).items()))
        yield _renamed(started, dict.fromkeys(gone.results, operand))


def _simpler_results(program: Program) -> Iterator[Program]:
    if program.result != "$a":
        for name in program.returned:
            yield dataclasses.replace(program, returned=(name,), result="$a")
    for statement in reversed(program.statements):
        for name in statement.results:
            if (name,) != program.returned and len(program.returned) == 1:
                yield dataclasses.replace(_until(program, statement), returned=(name,), result="$a")


def _until(program: Program, last: Statement) -> Program:
    """The program up to and with the statement `last`."""
    return dataclasses.replace(program, statements=program.statements[: program.statements.index(last) + 1])


def _renamed(program: Program, names: dict[str, str]) -> Program:
    """The program with other operands, by name."""
    statements = tuple(
        dataclasses.replace(s, operands=tuple(names.get(v, v) for v in s.operands))
        for s in program.statements
    )
    return dataclasses.replace(
        program, statements=statements, returned=tuple(names.get(v, v) for v in program.returned)
    )
