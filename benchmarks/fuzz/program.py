"""A random network as plain data, and the Python source that a user might have written for it."""

import dataclasses
import itertools
import string
import textwrap
from collections.abc import Iterable
from typing import Any

IMPORTS = """\
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.fuzz.library import *
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How the network is made and converted."""

    norm: str = "layer"
    num_groups: int | None = None
    proxy: bool = True
    proxy_padding: str = "activation"
    warm_start: str = "auto"
    example: bool = True  # whether transform gets example inputs
    training: bool = False  # the mode in which it is converted
    gain: float = 1.0  # of the BatchNorms' weights: large ones reach bounds far out
    dtype: str = "float64"
    anchor: float = 0.0

    def for_transform(self) -> dict[str, Any]:
        """The keyword arguments of `pn_compiler.transform`."""
        names = ("norm", "num_groups", "anchor", "proxy", "proxy_padding", "warm_start")
        return {name: getattr(self, name) for name in names}


#: kind of block -> the line that its statements stand under; X is a tensor that they read
CONTEXTS = {
    "no_grad": "with torch.no_grad():",
    "enable_grad": "with torch.enable_grad():",
    "autocast": "with torch.autocast('cpu', enabled=False):",
    "value": "if X.sum() < 1e30:",
    "random": "if torch.rand(()) < 2:",
    "tensor": "if isinstance(X, torch.Tensor):",
    "exact": "if type(X) is torch.Tensor:",
    "mode": "if self.training or True:",
}

#: how the inputs reach the forward -> its parameters and the first line of its body, with {names} for them
SIGNATURES = {
    "plain": ("{names}", ""),
    "star": ("*args", "{names}, = args"),
    "optional": (
        "{names}, mask=None, scale=1.5",
        "{first} = {first} * scale if mask is None else {first} * mask",
    ),
    "keyword": ("{names}, *, scale=0.5, **others", "{first} = {first} * others.get('scale', scale)"),
    "list": ("xs", "{names}, = xs"),
    "dict": ("batch", "{names}, = (batch[name] for name in {strings})"),
    "nested": ("batch", "{names}, = batch['images'][0]"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Statement:
    """Lines of a forward, with $a, $b for what it reads, $o, $p for its results, $m for a module.

    `block` names the part of the network it stands in; adjacent statements of one block share it.
    """

    kind: str
    template: str
    operands: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    block: str = ""

    @property
    def lines(self) -> str:
        names = dict(zip("abcd", self.operands, strict=False))
        names |= dict(zip("opqr", self.results, strict=False))
        names |= dict(zip("mn", self.modules, strict=False))
        return string.Template(self.template).substitute(names)


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """A network: inputs by name and shape, what __init__ declares by name, the forward, and its result.

    `result` is an expression of $a, $b, $c, which are `returned`. `shapes` are those of variables when they
    were made, as far as they are known: a smaller network may start from one of them.
    """

    seed: int
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    declarations: tuple[tuple[str, str], ...]
    statements: tuple[Statement, ...]
    returned: tuple[str, ...]
    result: str = "$a"
    options: Options = Options()
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    signature: str = "plain"

    def arguments(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """What to call the network with, to give it `tensors`."""
        if self.signature == "list":
            return (list(tensors),)
        if self.signature == "dict":
            return ({name: x for (name, _), x in zip(self.inputs, tensors, strict=True)},)
        if self.signature == "nested":
            return ({"images": (list(tensors),)},)
        return tensors


def block_kind(label: str) -> str:
    """The kind of the block `label`: its name without its number."""
    return label.rstrip("0123456789")


def source(program: Program) -> str:
    """The module `Net`, with classes and methods for its blocks."""
    return _Writer(program).source()


class _Writer:
    """Writes the classes of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.groups = [
            (label, list(g)) for label, g in itertools.groupby(program.statements, lambda s: s.block)
        ]
        self.declared = dict(program.declarations)
        self.init: list[str] = []
        self.forward: list[str] = []
        self.methods: list[str] = []
        self.classes: list[str] = []

    def source(self) -> str:
        owned = [self._own_modules(index) for index in range(len(self.groups))]
        self._declare(owned)
        for index, (label, statements) in enumerate(self.groups):
            body = "\n".join(s.lines for s in statements)
            if label.startswith("part"):
                self._write_part(index, body, owned[index])
            elif label.startswith("method"):
                reads, writes = self._interface(index)
                self.methods.append(_function(f"_{label}", reads, body, ", ".join(writes)))
                self.forward.append(_call(f"self._{label}", reads, writes))
            elif (kind := block_kind(label)) in CONTEXTS:
                header = CONTEXTS[kind].replace("X", self._interface(index)[0][0])
                self.forward.append(f"{header}\n{textwrap.indent(body, '    ')}")
            else:
                self.forward.append(body)
        names = dict(zip("abcd", self.program.returned, strict=False))
        result = string.Template(self.program.result).substitute(names)
        names = [name for name, _ in self.program.inputs]
        words = {"names": ", ".join(names), "first": names[0], "strings": names}
        parameters, unpacked = (part.format(**words) for part in SIGNATURES[self.program.signature])
        body = [unpacked] * bool(unpacked) + self.forward
        forward = _function("forward", [parameters], "\n".join(body), result)
        net = _class("Net", (), self.init, [*self.methods, forward])
        return "\n\n".join([IMPORTS, *self.classes, net]) + "\n"

    def _own_modules(self, index: int) -> list[str]:
        """What only the block `index` uses, and so may declare."""
        label, statements = self.groups[index]
        if not label.startswith("part"):
            return []
        others = {m for i, (_, g) in enumerate(self.groups) if i != index for s in g for m in s.modules}
        return [m for m in _unique(m for s in statements for m in s.modules) if m not in others]

    def _declare(self, owned: list[list[str]]) -> None:
        inside = {name for names in owned for name in names}
        used = {m for s in self.program.statements for m in s.modules}
        self.init += [text for name, text in self.program.declarations if name in used - inside]

    def _write_part(self, index: int, body: str, owned: list[str]) -> None:
        label, statements = self.groups[index]
        reads, writes = self._interface(index)
        shared = [m for m in _unique(m for s in statements for m in s.modules) if m not in owned]
        init = [self.declared[m] for m in owned] + [f"self.{m} = {m}" for m in shared]
        forward = _function("forward", reads, body, ", ".join(writes))
        self.classes.append(_class(label.title(), shared, init, [forward]))
        self.init.append(f"self.{label} = {label.title()}({', '.join(f'self.{m}' for m in shared)})")
        if block_kind(label) == "parthooked":
            self.init.append(f"self.{label}.register_forward_hook(lambda m, i, o: None)")
        self.forward.append(_call(f"self.{label}", reads, writes))

    def _interface(self, index: int) -> tuple[list[str], list[str]]:
        """Variables that the block `index` reads, and those of its own that are read behind it."""
        statements = self.groups[index][1]
        made = [v for s in statements for v in s.results]
        reads = []
        for i, statement in enumerate(statements):
            before = {v for s in statements[:i] for v in s.results}
            reads += [v for v in statement.operands if v not in before]
        later = {v for _, g in self.groups[index + 1 :] for s in g for v in s.operands}
        return _unique(reads), [v for v in _unique(made) if v in later | set(self.program.returned)]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _call(function: str, reads: list[str], writes: list[str]) -> str:
    return (f"{', '.join(writes)} = " if writes else "") + f"{function}({', '.join(reads)})"


def _function(name: str, arguments: Iterable[str], body: str, result: str) -> str:
    lines = [line for line in (body, f"return {result}" if result else "") if line]
    return f"def {name}({', '.join(['self', *arguments])}):\n" + textwrap.indent("\n".join(lines), "    ")


def _class(name: str, arguments: Iterable[str], init: list[str], methods: list[str]) -> str:
    constructor = _function("__init__", arguments, "\n".join(["super().__init__()", *init]), "")
    return f"class {name}(nn.Module):\n" + textwrap.indent("\n\n".join([constructor, *methods]), "    ")
