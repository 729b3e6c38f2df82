"""Random networks: statement after statement is tried on small tensors, and kept if it runs."""

import dataclasses
import random
import re
import string
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fuzz import layers, library
from benchmarks.fuzz.forms import Family, fill, read_forms
from benchmarks.fuzz.program import CONTEXTS, SIGNATURES, Options, Program, Statement
from pn_compiler.testing import randomize_batch_norms

BATCH = 3
MOST_VALUES = 6000  # in one tensor
LARGEST = 1e3
_FORMS = read_forms()
_HAS_NORM = re.compile("Norm|ABN|ShuffleUnit|Tied")
_WRITES = re.compile(r"_\(|place|True\)|[-+*/]=|\] = |out=|\.data|resize_|^self\.")  # perhaps in place
NAMESPACE = {"torch": torch, "nn": nn, "F": F} | {name: getattr(library, name) for name in library.__all__}

#: what follows what, most of the time: kind -> (next kind, probability)
_USUALLY = {
    "conv": ("norm", 0.75),
    "transposed": ("norm", 0.7),
    "linear": ("norm", 0.6),
    "functional": ("norm", 0.5),
    "norm": ("nonlinear", 0.6),
    "activation": ("layer", 0.35),
    "module": ("layer", 0.35),
}


def generate(seed: int) -> Program:
    """The network of this `seed`: always the same, and with a BatchNorm that is called."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        while True:
            program = _Session(seed, rng).program()
            called = {name for statement in program.statements for name in statement.modules}
            if any(_HAS_NORM.search(text) for name, text in program.declarations if name in called):
                return program


class _Session:
    """The network so far, its variables and their values."""

    def __init__(self, seed: int, rng: random.Random) -> None:
        self.seed, self.rng = seed, rng
        self.root = nn.Module().double().eval()
        self.values: dict[str, Tensor] = {}
        self.inputs: list[tuple[str, tuple[int, ...]]] = []
        self.declarations: dict[str, str] = {}
        self.statements: list[Statement] = []
        self.counter = 0

    def program(self) -> Program:
        self._draw_inputs()
        for _ in range(self.rng.randint(4, 14)):
            self._draw_statement()
        if self.rng.random() < 0.8:
            self._draw_layer(self._recent())
        returned, result = self._draw_result()
        program = Program(
            self.seed,
            tuple(self.inputs),
            tuple(self.declarations.items()),
            self._live(returned),
            returned,
            result,
            self._draw_options(),
            tuple((name, tuple(value.shape)) for name, value in self.values.items()),
        )
        return self._draw_signature(
            dataclasses.replace(program, statements=self._draw_blocks(program.statements))
        )

    def _draw_signature(self, program: Program) -> Program:
        if self.rng.random() < 0.75:
            return program
        options = dataclasses.replace(program.options, example=True)  # what *args are cannot be told without
        return dataclasses.replace(program, signature=self.rng.choice(list(SIGNATURES)), options=options)

    # What there is

    def _name(self, letter: str) -> str:
        self.counter += 1
        return f"{letter}{self.counter}"

    def _recent(self) -> str:
        """A variable, most often the newest, or one that nothing has read."""
        names, draw = list(self.values), self.rng.random()
        read = {name for statement in self.statements for name in statement.operands}
        unread = [name for name in names if name not in read]
        if draw < 0.65:
            return names[-1]
        return self.rng.choice(unread if unread and draw < 0.85 else names)

    def _partner(self, name: str) -> str:
        """A second operand: most often of the same shape."""
        shape = self.values[name].shape
        same = [other for other, value in self.values.items() if value.shape == shape and other != name]
        near = [
            other for other, value in self.values.items() if value.shape[2:] == shape[2:] and other != name
        ]
        pool = same if same and self.rng.random() < 0.7 else near or list(self.values)
        return self.rng.choice(pool)

    def _draw_inputs(self) -> None:
        rank = self.rng.choice((0, 1, 1, 2, 2, 2, 2, 2, 3))
        size = {0: 1, 1: 10, 2: 8, 3: 4}[rank]
        shape = (BATCH, self.rng.choice((2, 3, 4)), *[size] * rank)
        self._add_input(shape)
        if self.rng.random() < 0.2:
            self._add_input(self.rng.choice((shape, (BATCH, 1, *shape[2:]), (BATCH, 4))))

    def _add_input(self, shape: tuple[int, ...]) -> None:
        name = f"x{len(self.inputs)}"
        self.inputs.append((name, shape))
        self.values[name] = torch.randn(shape, dtype=torch.float64)

    # Statements

    def _draw_statement(self) -> None:
        for _ in range(12):
            if self._attempt_any():
                return

    def _attempt_any(self) -> bool:
        last = self.statements[-1].kind if self.statements else "input"
        if last == "input" and self.rng.random() < 0.8:
            return self._draw_layer(next(iter(self.values)))
        following, probability = _USUALLY.get(last, ("", 0.0))
        if self.rng.random() < probability:
            return getattr(self, f"_draw_{following}")(list(self.values)[-1])
        choice = self.rng.random()
        if choice < 0.2:
            return self._draw_layer(self._recent())
        if choice < 0.3:
            return self._draw_norm(self._recent())
        if choice < 0.42:
            return self._draw_nonlinear(self._recent())
        if choice < 0.45:
            return self._reuse()
        family = self.rng.choices(list(_FORMS.values()), [f.weight for f in _FORMS.values()])[0]
        return self._draw_form(family, self._recent())

    def _draw_layer(self, name: str) -> bool:
        value = self.values[name]
        rank = value.dim() - 2
        if rank not in (1, 2, 3) or self.rng.random() < 0.08:
            return self._attempt(*layers.linear(self.rng, value.shape[-1]), (name,))
        draw = self.rng.random()
        if draw < 0.3:
            kind = "compound" if draw < 0.16 else "functional"
            declared, template = fill(self.rng.choice(_FORMS[kind].forms), value.shape, self.rng).split(
                " :: "
            )
            return self._attempt(kind, f"self.$m = {declared}", template, (name,))
        maker = layers.transposed if draw < 0.4 else layers.convolution
        return self._attempt(*maker(self.rng, value.shape[1], rank), (name,))

    def _draw_norm(self, name: str) -> bool:
        value = self.values[name]
        if value.dim() > 5:
            return False
        return self._attempt(*layers.norm(self.rng, value.shape[1], value.dim() - 2), (name,))

    def _draw_nonlinear(self, name: str) -> bool:
        draw = self.rng.random()
        if draw < 0.4:
            layer = fill(self.rng.choice(_FORMS["module"].forms), self.values[name].shape, self.rng)
            return self._attempt("module", f"self.$m = {layer}", "$o = self.$m($a)", (name,))
        return self._draw_form(_FORMS["activation" if draw < 0.75 else "piecewise"], name)

    def _reuse(self) -> bool:
        """Another call of a module: a shared activation, BatchNorm or convolution."""
        modules = [
            s
            for s in self.statements
            if s.modules and isinstance(getattr(self.root, s.modules[0]), nn.Module)
        ]
        if not modules:
            return False
        again = self.rng.choice(modules)
        names = [self._recent() for _ in again.operands]
        return self._attempt(again.kind, "", again.template, names, again.modules)

    def _draw_form(self, family: Family, name: str) -> bool:
        value = self.values[name]
        template = fill(self.rng.choice(family.forms), value.shape, self.rng)
        operands = (name, self._partner(name)) if "$b" in template else (name,)
        init = ""
        if "$m" in template:
            channels = value.shape[1]
            flat = "prelu" in template or "view" in template
            shape = "-1" + ", 1" * (0 if flat else value.dim() - 2)
            kind = self.rng.choice(("self.$m = nn.Parameter({})", "self.register_buffer('$m', {})"))
            init = kind.format(f"torch.linspace(0.1, 1.5, {channels}).view({shape})")
        return self._attempt(family.kind, init, template, operands)

    def _attempt(
        self, kind: str, init: str, template: str, operands: Sequence[str], modules: Sequence[str] = ()
    ) -> bool:
        """Runs a statement; keeps it if its results are usable. Says whether."""
        names = set(re.findall(r"\$([a-z])", template))
        results = tuple(self._name("h") for letter in "op" if letter in names)
        if init:
            modules = (self._name("m"),)
        statement = Statement(kind, template, tuple(operands), results, tuple(modules))
        try:
            self._declare(init, modules)
            copies = {k: v.clone() for k, v in self.values.items() if k in operands}
            if all(usable(value) for value in self._run(statement, copies)):
                made = self._run(statement, self.values)
                self.values |= dict(zip(results, made, strict=False))
                self.statements.append(statement)
                return True
        except Exception:  # it does not fit these tensors: that is what trying is for
            pass
        if init:
            self.declarations.pop(modules[0], None)
        return False

    def _declare(self, init: str, modules: Sequence[str]) -> None:
        if not init:
            return
        text = string.Template(init).substitute(m=modules[0])
        exec(text, dict(NAMESPACE), {"self": self.root})
        self.root.double().eval()
        randomize_batch_norms(self.root)
        self.declarations[modules[0]] = text

    def _run(self, statement: Statement, values: dict[str, Tensor]) -> list[Tensor]:
        """The statement's results, or, if it only writes, its operands afterwards."""
        scope = dict(NAMESPACE) | {"self": self.root} | values
        with torch.no_grad():
            exec(statement.lines, scope)
        return [scope[name] for name in (*statement.results, *statement.operands)]

    # The rest of a network

    def _live(self, returned: Sequence[str]) -> tuple[Statement, ...]:
        """The statements without most of those that nothing reads."""
        live, kept = set(returned), []
        for statement in reversed(self.statements):
            writes = _WRITES.search(
                statement.template + self.declarations.get("".join(statement.modules[:1]), "")
            )
            if writes or live.intersection(statement.results) or self.rng.random() < 0.01:
                live.update(statement.operands)
                kept.append(statement)
        return tuple(reversed(kept))

    def _draw_result(self) -> tuple[tuple[str, ...], str]:
        names = list(self.values)
        read = {name for statement in self.statements for name in statement.operands}
        others = [name for name in names[:-1] if name not in read] or names[len(self.inputs) : -1]
        if others and self.rng.random() < 0.45:
            returned = (names[-1], *self.rng.sample(others, min(len(others), self.rng.choice((1, 2)))))
            forms = ("($a, $b)", "{'out': $a, 'aux': $b}", "[$a, ($b,)]", "{'out': [$a], 'aux': $b}")
            if len(returned) == 3:
                forms = ("($a, $b, $c)", "{'out': $a, 'aux': ($b, $c)}", "($a, [$b, $c])")
            return returned, self.rng.choice(forms)
        return (names[-1],), "$a"

    def _draw_options(self) -> Options:
        rng = self.rng
        norm = rng.choice(("layer", "layer", "group", "instance"))
        later = random.Random(
            f"anchors of {self.seed}"
        )  # a stream of its own: older seeds keep their networks
        return Options(
            norm="rms" if later.random() < 0.25 else norm,
            anchor=later.choice((0.0, 0.0, 0.3, 0.9, 1.0)),
            num_groups=rng.choice((None, 2)) if norm == "group" else None,
            proxy_padding=rng.choice(("activation", "activation", "activation", "output")),
            warm_start=rng.choice(("auto", "auto", "none")),
            example=rng.random() < 0.75,
            training=rng.random() < 0.2,
            gain=rng.choice((1.0, 1.0, 8.0, 40.0)),
            dtype="float64" if rng.random() < 0.9 else "float32",
        )

    def _draw_blocks(self, statements: tuple[Statement, ...]) -> tuple[Statement, ...]:
        """Puts some ranges of statements into classes, methods and contexts of their own."""
        placed, position = list(statements), 0
        while position < len(placed):
            length = self.rng.randint(1, 4)
            if self.rng.random() < 0.3:
                kinds = ("part", "method", "parthooked", self.rng.choice(list(CONTEXTS)))
                kind = self.rng.choices(kinds, (0.6, 0.24, 0.06, 0.1))[0]
                for i in range(position, min(position + length, len(placed))):
                    placed[i] = dataclasses.replace(placed[i], block=f"{kind}{position}")
            position += length
        return tuple(placed)


def usable(value: Tensor) -> bool:
    """Whether a variable may have this value: a batch of finite numbers of moderate size that differ."""
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.float64
        and 2 <= value.dim() <= 6
        and value.shape[0] == BATCH
        and BATCH < value.numel() <= MOST_VALUES
        and bool(value.isfinite().all())
        and float(value.abs().max()) < LARGEST
    )
