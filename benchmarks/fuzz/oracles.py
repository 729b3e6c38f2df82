"""What the conversion of a network is compared with."""

import contextlib
import copy
import dataclasses
import io
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import pn_compiler
from benchmarks.fuzz.build import build, dtype_of, inputs_of
from benchmarks.fuzz.compare import difference, first, gradients, identical, run, snapshot
from benchmarks.fuzz.program import Program
from benchmarks.fuzz.reference import ByHand
from pn_compiler.base.errors import ExportError, PnCompilerError, VerificationError
from pn_compiler.export import write_onnx
from pn_compiler.export.options import ExportOptions
from pn_compiler.running.inputs import Inputs

#: "unexportable": torch.onnx refuses the network as it came, too
Outcome = Literal["ok", "wrong", "crash", "refused", "unexportable", "invalid"]

#: largest error, relative to the largest magnitude of an output, that is always admitted
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_NOISE = {torch.float64: 1e-12, torch.float32: 1e-6}  # to measure how much a network magnifies errors
_MAGNIFIED = 1e3  # how many times that effect explains a difference
_CHAOTIC = 1e-3  # a network that magnifies noise to this says nothing
_MOST_OF_A_FILE = 1e-2  # error at which export_onnx never writes a file
_SECONDS = 60  # for one network; longer counts as a hang

#: what compares numbers; a failure of these has its cause in what the network consists of
COMPARISONS = frozenset({
    "conversion by hand", "gradient", "gradient lost or found", "proxy on against off",
    "alone against in its batch", "fold against eval", "onnxruntime against by hand",
})  # fmt: skip

#: scale and shift of the inputs
INPUTS = ((1.0, 0.0), (300.0, 50.0), (2.0, -100.0))


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one network.

    Attributes:
        cause: failures of one cause have the same text.
        detail: numbers, or a traceback.
        codes: of the warnings in the records.
    """

    outcome: Outcome
    cause: str = ""
    detail: str = ""
    codes: tuple[str, ...] = ()


class _WrongError(Exception):
    """A comparison failed."""

    def __init__(self, oracle: str, detail: str) -> None:
        super().__init__(oracle)
        self.oracle, self.detail = oracle, detail


class _InvalidError(Exception):
    """The network itself is unfit to be compared with."""


class _HangError(Exception):
    """It took too long."""


def check(program: Program, *, onnx: bool = False) -> Verdict:
    """Converts the network of `program` and compares it with everything that it should equal."""
    quiet = contextlib.redirect_stderr(io.StringIO())  # torch.fx prints where a graph fails
    with warnings.catch_warnings(), quiet, _limit(_SECONDS):
        warnings.simplefilter("ignore")
        try:
            checker = _Checker(program)
        except Exception as error:  # the generated code is at fault
            return Verdict("invalid", detail=f"{type(error).__name__}: {error}")
        try:
            checker.run(onnx=onnx)
        except _InvalidError as error:
            return Verdict("invalid", detail=str(error))
        except _WrongError as error:
            return Verdict("wrong", error.oracle, error.detail, checker.codes)
        except PnCompilerError as error:
            of_file = isinstance(error, ExportError | VerificationError)
            alike = of_file and not checker.exports_unconverted()
            outcome: Outcome = "unexportable" if alike else "refused"
            return Verdict(outcome, _refusal(error), str(error), checker.codes)
        except Exception as error:
            return Verdict("crash", _crash(error), traceback.format_exc(), checker.codes)
    return Verdict("ok", codes=checker.codes)


class _Checker:
    """One network, and each comparison as a method."""

    def __init__(self, program: Program) -> None:
        self.program, self.options = program, program.options
        self.codes: tuple[str, ...] = ()
        self.late: list[_WrongError] = []  # what is reported only if nothing else is: it would hide the rest
        self.dtype = dtype_of(program)
        self.model = build(program)
        self.inputs = [inputs_of(program, *how) for how in INPUTS]
        self.state = snapshot(self.model)
        original = copy.deepcopy(self.model)  # which may write to itself
        for args in self.inputs:
            self.check_fit(run(original, first(args)), run(original, args))

    def check_fit(self, alone: Any, together: Any) -> None:
        """Whether the samples are independent before pn_compiler comes in."""
        if difference(alone, first(together)) > 10 * _TOLERANCE[self.dtype]:
            raise _InvalidError("the samples depend on each other")

    def run(self, *, onnx: bool) -> None:
        plain = self.convert(proxy=False)
        self.check_caller()
        self.check_records(plain)
        by_hand = ByHand(self.model, pn_compiler.sites(plain)).eval()
        limits = self.limits(by_hand)
        for args, limit in zip(self.inputs, limits, strict=True):
            compare("conversion by hand", run(plain, args), run(by_hand, args), limit)
        self.check_gradients(plain, by_hand, limits[0])
        converted = self.convert(proxy=True)
        self.check_proxy(converted, plain, limits)
        self.check_alone(converted, limits)
        self.check_fold(converted, limits)
        self.check_training(converted, by_hand)
        if onnx:
            self.check_onnx(plain, by_hand)
        if self.late:
            raise self.late[0]

    def convert(self, *, proxy: bool) -> nn.Module:
        converted = self.transform(proxy=proxy, training=self.options.training)
        if self.options.training and has_note(
            converted, "PN110"
        ):  # says that the mode is fixed: then to eval
            converted = self.transform(proxy=proxy, training=False)
        warnings_found = (n.code for n in pn_compiler.notes(converted) if n.severity == "warning")
        self.codes = tuple(sorted(set(warnings_found)))
        return converted.eval()

    def transform(self, *, proxy: bool, training: bool) -> nn.Module:
        example = inputs_of(self.program) if self.options.example else ()
        given = pytree.tree_leaves(example)
        kept = [x.clone() for x in given]
        options = self.options.for_transform() | {"proxy": proxy}
        converted = pn_compiler.transform(self.model.train(training), example or None, **options)
        self.model.eval()
        if not all(map(torch.equal, given, kept)):
            self.late.append(_WrongError("caller's inputs changed", ""))
        return converted

    def limits(self, by_hand: ByHand) -> list[float]:
        """The tolerance for each of the inputs. Raises _InvalidError if the network magnifies rounding."""
        found, noise = [], _NOISE[self.dtype]
        for args in self.inputs:
            nearby = pytree.tree_map(lambda x: x * (1 + noise * torch.cos(1e3 * x)), args)
            expected, by_hand.noise = run(by_hand, args), noise
            magnified = difference(run(by_hand, nearby), expected)
            by_hand.noise = 0.0
            try:
                alone = run(by_hand, first(args))
            except ValueError as error:  # of a single pixel, which only example inputs show
                raise _InvalidError(f"one value per group: {error}") from error
            self.check_fit(alone, expected)
            if not magnified < _CHAOTIC:
                raise _InvalidError(f"noise of {noise:.0e} becomes {magnified:.0e}")
            found.append(max(_TOLERANCE[self.dtype], _MAGNIFIED * magnified))
        return found

    def check_caller(self) -> None:
        now = snapshot(self.model)
        if now.keys() != self.state.keys() or any(not identical(now[k], self.state[k]) for k in now):
            self.late.append(_WrongError("caller's model changed", ""))

    def check_records(self, converted: nn.Module) -> None:
        sites = {site.name: site for site in pn_compiler.sites(converted)}
        for name, module in self.model.named_modules():
            named = sites.keys() & {name, f"{name}.norm"}  # the latter of a functional batch_norm
            if isinstance(getattr(module, "running_mean", None), Tensor) and not named:
                self.late.append(_WrongError("no record", name))
        left: dict[nn.Module, list[str]] = {}  # with all its names: the record has the first in the original
        for name, module in converted.named_modules(remove_duplicate=False):
            if isinstance(module, _BatchNorm):
                left.setdefault(module, []).append(name)
        for names in left.values():
            if not any(name in sites and sites[name].kind == "skipped" for name in names):
                self.late.append(_WrongError("BatchNorm left without a record", names[0]))

    def check_gradients(self, plain: nn.Module, by_hand: ByHand, limit: float) -> None:
        """Gradients of what the conversion does not touch, in eval mode."""
        try:
            expected = self.gradients_of(by_hand)
        except RuntimeError:  # the original cannot be trained: an in-place operation on what is needed later
            return
        aliases: dict[int, list[str]] = {}
        for name, parameter in by_hand.model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        converted = {site.name for site in pn_compiler.sites(plain) if site.kind != "skipped"}
        converted |= {name.removesuffix(".norm") for name in converted}
        actual, noisy = gradients(plain, self.inputs[0]), self.gradients_of(by_hand, noise=_NOISE[self.dtype])
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for names in aliases.values():
            value = expected[f"model.{names[0]}"]
            name = next((name for name in names if name in actual), None)
            if names[0].rpartition(".")[0] in converted:
                continue
            if value is not None and name is None:
                raise _WrongError("parameter lost", names[0])
            if (value is None) != (actual.get(name or "") is None):
                raise _WrongError("gradient lost or found", f"{name}: {value is not None} originally")
            if value is not None and name is not None:
                found.append((actual[name], value, noisy[f"model.{names[0]}"]))
        if found:
            # relative to the largest of all: that of a bias in front of a normalizer is nothing but rounding
            all_of = (torch.cat([g.flatten() for g in gradient]) for gradient in zip(*found, strict=True))
            self.compare_gradients(*all_of, 1e3 * limit)

    def gradients_of(self, by_hand: ByHand, noise: float = 0.0) -> dict[str, Tensor | None]:
        """Those of a copy: what a network keeps of this call cannot be copied for the next comparison."""
        copied = copy.deepcopy(by_hand)
        copied.noise = noise
        return gradients(copied, self.inputs[0])

    @staticmethod
    def compare_gradients(actual: Tensor, expected: Tensor, noisy: Tensor, limit: float) -> None:
        """In front of a normalizer they may all cancel, so that what is left is rounding of the large terms.

        Noise of 1e-12 on every normalizer and its gradient, thousands of times the rounding of float64,
        bounds what rounding does to them. If it is no longer small, there is nothing to compare. Nor is there
        if the original's own overflow, as those of x / (1 + exp(-x)) do at -100 in float32.
        """
        magnified = difference(noisy, expected)
        if magnified < _CHAOTIC and expected.isfinite().all():
            compare("gradient", actual, expected, max(limit, magnified))

    def check_proxy(self, converted: nn.Module, plain: nn.Module, limits: list[float]) -> None:
        """In a warm start proxy normalization changes nothing, unless PN207 says that it does."""
        sites = pn_compiler.sites(converted)
        exact = all(site.warm_start or site.kind != "pn" for site in sites)
        if not exact or has_note(converted, "PN207"):
            return
        for args, limit in zip(self.inputs, limits, strict=True):
            compare("proxy on against off", run(converted, args), run(plain, args), limit)

    def check_alone(self, converted: nn.Module, limits: list[float]) -> None:
        for args, limit in zip(self.inputs, limits, strict=True):
            compare(
                "alone against in its batch", run(converted, first(args)), first(run(converted, args)), limit
            )

    def check_fold(self, converted: nn.Module, limits: list[float]) -> None:
        folded = pn_compiler.fold(converted)
        for args, limit in zip(self.inputs, limits, strict=True):
            compare("fold against eval", run(folded, args), run(converted, args), limit)

    def check_training(self, converted: nn.Module, by_hand: nn.Module) -> None:
        try:
            gradients(copy.deepcopy(by_hand).train(), self.inputs[0])
        except (RuntimeError, ValueError):  # the latter of one value per channel
            return
        gradients(copy.deepcopy(converted).train(), self.inputs[0])

    def check_onnx(self, plain: nn.Module, by_hand: nn.Module) -> None:
        """The file of the converted network in onnxruntime against the conversion by hand, batch 1 and 3."""
        import onnxruntime

        narrow = pytree.tree_map(lambda x: x.float(), self.inputs[0])
        if not self.is_warm(plain) or not self.runs_narrow(narrow):
            return
        converted = copy.deepcopy(self.convert(proxy=True)).float()
        if has_note(converted, "PN207"):  # not what the conversion by hand computes
            return
        wide, rough = copy.deepcopy(by_hand).float().double(), copy.deepcopy(by_hand).float()
        calls = [(args, *self.in_float32(wide, rough, args)) for args in (narrow, first(narrow))]
        if any(error > _MOST_OF_A_FILE for *_, error in calls):
            return  # whatever the file computes in float32, it is not written
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            pn_compiler.export_onnx(converted, path, narrow)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        for args, expected, error in calls:
            feed = dict(zip(names, (x.numpy() for x in pytree.tree_leaves(args)), strict=True))
            actual = [torch.from_numpy(y) for y in session.run(None, feed)]
            compare("onnxruntime against by hand", actual, expected, max(1e-3, 50 * error))

    @staticmethod
    def in_float32(wide: nn.Module, rough: nn.Module, args: Any) -> tuple[list[Tensor], float]:
        """Outputs in float64, and how far those in float32 are from them."""
        expected = pytree.tree_leaves(run(wide, pytree.tree_map(lambda x: x.double(), args)))
        return expected, difference(run(rough, args), expected)

    def runs_narrow(self, narrow: Any) -> bool:
        """Whether the network as it came runs in float32: not if it casts to float64."""
        try:
            run(copy.deepcopy(self.model).float(), narrow)
        except RuntimeError:
            return False
        return True

    def exports_unconverted(self) -> bool:
        """Whether the network as it came can be exported to a file that the checker and onnxruntime take."""
        inputs = Inputs(pytree.tree_map(lambda x: x.float(), self.inputs[0]))
        model = copy.deepcopy(self.model).float().eval()
        with tempfile.TemporaryDirectory() as folder:
            try:
                write_onnx(model, model, Path(folder, "model.onnx"), inputs, ExportOptions())
            except (ExportError, VerificationError):
                return False
        return True

    @staticmethod
    def is_warm(model: nn.Module) -> bool:
        return all(s.warm_start for s in pn_compiler.sites(model))


def has_note(model: nn.Module, code: str) -> bool:
    return any(note.code == code for note in pn_compiler.notes(model))


def compare(oracle: str, actual: Any, expected: Any, limit: float) -> None:
    if len(pytree.tree_leaves(actual)) != len(pytree.tree_leaves(expected)):
        raise _WrongError(oracle, "another number of outputs")
    error = difference(actual, expected)
    if not error <= limit:
        raise _WrongError(oracle, f"error {error:.1e}, limit {limit:.1e}")


def _refusal(error: PnCompilerError) -> str:
    return f"{type(error).__name__}: {_general(str(error))}"


def _crash(error: BaseException) -> str:
    """The exception without names and numbers, and the last line of the product that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if re.search(r"(pn_compiler|passes|export)/\w+\.py$", f.filename)]
    where = f" in {Path(ours[-1].filename).stem}.{ours[-1].name}" if ours else ""
    return f"{type(error).__name__}: {_general(str(error))}{where}"


def _general(message: str) -> str:
    line = (message.strip().splitlines() or [""])[0]
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", line)[:110]


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raises _HangError behind `seconds`. Only in the main thread, where signals arrive."""

    def late(*_: Any) -> None:
        raise _HangError(f"longer than {seconds} s")

    handler = signal.signal(signal.SIGALRM, late)
    start, (left, _) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)  # and the timer of whoever had set one, such as pytest-timeout
        signal.setitimer(signal.ITIMER_REAL, max(0.01, left - time.monotonic() + start) if left else 0)
