"""Random damage to good model files: the command loads them or refuses them in one line, and runs nothing.

python -m tests.security.mutations --count 10000 --seed 1
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.security.files import COMPILE, ONE_IMAGE, entries, network, packed, program, saved
from tests.security.sandbox import outcomes

_CHUNK = 200
_STRAYS = (
    b"",
    b"0",
    b"-1",
    b"999999999999",
    b"null",
    b"NaN",
    b"[]",
    b"{}",
    b'"x"',
    b"true",
    b"9**9**9",
    b"os.system",
)


def mutants(numbers: Iterable[int], seed: int) -> Iterator[tuple[str, bytes]]:
    """Name and content of damaged files, which depend on nothing but their number and the seed."""
    sources = {"pt": saved(network()), "ckpt": saved(network().state_dict()), "pt2": program()}
    for number in numbers:
        kind = (*sources,)[number % len(sources)]
        rng = random.Random(f"{seed} {number}")
        yield f"{seed}_{number}.{kind}", mutate(sources[kind], rng)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Damages the archive, or one of its entries and makes the archive fit again."""
    if rng.random() < 0.3:
        return _damaged(content, rng)
    contents = entries(content)
    names = [name for name in contents if contents[name]]
    likely = [name for name in names if name.endswith((".json", ".pkl"))]
    name = rng.choice(likely if likely and rng.random() < 0.8 else names)
    contents[name] = _damaged(contents[name], rng)
    return packed(contents)


def _damaged(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        content = rng.choice(_DAMAGES)(content, rng)
    return content


def _flip(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content) or 1)
    return (
        content[:place]
        + bytes([(content[place : place + 1] or b"\0")[0] ^ (1 << rng.randrange(8))])
        + content[place + 1 :]
    )


def _cut(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) or 1)
    return content[:start] + content[start + rng.choice((1, 2, 8, 100, len(content))) :]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) or 1)
    piece = content[start : start + rng.choice((1, 8, 100))]
    place = rng.randrange(len(content) or 1)
    return content[:place] + piece + content[place:]


def _insert(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content) or 1)
    return content[:place] + rng.choice((*_STRAYS, rng.randbytes(4))) + content[place:]


def _replace_number(content: bytes, rng: random.Random) -> bytes:
    """One run of digits becomes something else: sizes, indices, lengths."""
    places = [i for i in range(len(content)) if content[i : i + 1].isdigit()]
    if not places:
        return _flip(content, rng)
    start = end = rng.choice(places)
    while content[end : end + 1].isdigit():
        end += 1
    return content[:start] + rng.choice(_STRAYS) + content[end:]


_DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _flip,
    _cut,
    _repeat,
    _insert,
    _replace_number,
)


def problems(count: int, seed: int, folder: Path, task: tuple[str, ...] = ("--dry-run",)) -> Iterator[str]:
    """Says of each file that is treated wrong what it is; the file stays in `folder`."""
    options = {
        ".pt": ONE_IMAGE,
        ".ckpt": (*ONE_IMAGE, "--arch", "tests.security.files:network"),
        ".pt2": (),
    }
    for start in range(0, count, _CHUNK):
        files = dict(mutants(range(start, min(count, start + _CHUNK)), seed))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        runs = [(name, (name, *task, *options[Path(name).suffix])) for name in files]
        for name, outcome in outcomes(runs, folder):
            if problem := outcome.problem(None):
                yield f"{name}: {problem}"
            else:
                (folder / name).unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile what loads; slower")
    arguments = parser.parse_args()
    task = COMPILE if arguments.compile else ("--dry-run",)
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    found = 0
    for problem in problems(arguments.count, arguments.seed, folder, task):
        found += 1
        sys.stdout.write(f"{problem}\n")
    sys.stdout.write(f"{arguments.count} files, {found} treated wrong; those are in {folder}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
