"""Whether a traced graph computes what the model computes, with BatchNorm still in both."""

import contextlib
import dis
import functools
import inspect
import math
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pn_compiler.base.errors import ConfigError, TraceError
from pn_compiler.inspection.captured import nested_codes
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.running.evaluation import run, seed_everything, untouched
from pn_compiler.running.float64 import Float64
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.last_digits import OtherLastDigits
from pn_compiler.running.losses import named_outputs

#: Relative to the largest magnitude of a tensor. The graph runs the model's own operators in their order;
#: only activations that are written out by hand are replaced, to 1e-7, which deep networks amplify.
_LIMIT = 1e-5
_LIMIT_IN_OWN_DTYPE = 1e-2  # where a forward has its dtype written in, and float64 cannot be had
_ROUNDING = 1e-8  # by which inputs are moved to see whether a network is chaotic
_LARGE = 300.0  # magnitude of the scaled copies: bounds and thresholds inside activations come into play
_SHIFT = 100.0


def check_equivalent(model: nn.Module, graph: nn.Module, inputs: Inputs, *, own_modes: bool = False) -> None:
    """Compares `graph` with `model` on `inputs`, and on copies of them that are scaled and shifted.

    In float64, unless the forward cannot run in it. Both see the same random numbers.

    Args:
        model: the network as the user brought it; it is left as it was.
        graph: what was traced of it, in which nothing has been converted; likewise.
        inputs: arguments of a call.
        own_modes: run both in the mode in which they are, instead of eval mode.

    Raises:
        ConfigError: the model does not run on `inputs`.
        VaryingOutputsError: its outputs vary from call to call, so that nothing can be compared.
        ChaoticOutputsError: it is chaotic: rounding alone changes its outputs.
        NoValuesError: its outputs hold no values, so that nothing was compared.
        TraceError: the outputs differ. The message names the first module whose output does.
    """
    runner, expected = _first_run(model, inputs, own_modes)
    compared = False
    for number, values in enumerate(_variants(inputs)):
        if number:
            try:
                expected = runner(model, values)
            except ConfigError:
                continue  # values that the model refuses itself
        compared = compared or any(tensor.numel() for tensor in _tensors(expected).values())
        try:
            actual = runner(graph, values)
        except ConfigError as error:
            raise TraceError(
                f"what torch.fx traces of {type(model).__name__} fails where the model itself runs: {error}"
            ) from error
        difference = largest_difference(actual, expected)
        if difference > runner.limit:
            if largest_difference(runner(model, values), expected) > runner.limit:
                raise VaryingOutputsError(model, _varying(model, values, runner))
            if _rounding_decides(model, values, runner, expected, difference):
                raise ChaoticOutputsError(f"outputs of {type(model).__name__} depend on the last digits")
            where = _where(model, graph, values, runner)
            scaled = " on scaled copies of the example inputs" if number else ""
            raise TraceError(
                f"torch.fx traces {type(model).__name__} to something else{scaled}: its outputs are off by "
                f"{difference:.1e} of their largest magnitude. {where}"
            )

    if not compared:
        raise NoValuesError(f"outputs of {type(model).__name__} hold no values for the example inputs")


class NoValuesError(ConfigError):
    """A model returns no values for its inputs, like a detector that finds nothing."""


class VaryingOutputsError(ConfigError):
    """A model returns other outputs for the same inputs and random numbers: it counts, or reads a clock.

    Attributes:
        path: of the first module whose outputs vary though its inputs do not.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        where = f"{path} ({type(model.get_submodule(path)).__name__})" if path else type(model).__name__
        super().__init__(f"outputs of {where} vary from call to call, by more than random numbers of torch")
        self.path = path


class ChaoticOutputsError(ConfigError):
    """A model gives other outputs for inputs or intermediate results that differ by less than rounding."""


class _Runner:
    """Runs a model with gradients off, seeded, and leaves it as it was."""

    def __init__(self, own_modes: bool, dtype: torch.dtype | None) -> None:
        self.own_modes, self.dtype = own_modes, dtype
        self.limit = _LIMIT_IN_OWN_DTYPE if dtype is None else _LIMIT

    def __call__(self, model: nn.Module, inputs: Inputs) -> Any:
        precision = contextlib.nullcontext() if self.dtype is None else Float64(model)
        with untouched(model, own_modes=self.own_modes, keep_state=True):
            seed_everything()
            with precision:
                return run(model, self.cast(inputs), "the example inputs")

    def cast(self, inputs: Inputs) -> Inputs:
        dtype = self.dtype
        return inputs if dtype is None else inputs.map(lambda x: x.to(dtype) if x.is_floating_point() else x)


def _first_run(model: nn.Module, inputs: Inputs, own_modes: bool) -> tuple[_Runner, Any]:
    """A runner in float64, or without a dtype if the forward has one written in; and what it gives."""
    try:
        runner = _Runner(own_modes, torch.float64)
        return runner, runner(model, inputs)
    except ConfigError:  # it may not run at all: a run in its own dtype shows that
        runner = _Runner(own_modes, None)
        return runner, runner(model, inputs)


def _variants(inputs: Inputs) -> Iterator[Inputs]:
    """`inputs`, and copies whose floating-point values reach hundreds, shifted down and up."""
    yield inputs
    floats = [x for x in inputs.tensors() if x.is_floating_point() and x.numel()]
    if not floats:
        return
    largest = max(float(x.detach().abs().max()) for x in floats)
    scale = _LARGE / largest if 0 < largest < math.inf else 1.0
    for shift in (-_SHIFT, _SHIFT):
        yield inputs.map(functools.partial(_affine, scale=scale, shift=shift))


def _rounding_decides(
    model: nn.Module, values: Inputs, runner: _Runner, expected: Any, difference: float
) -> bool:
    """Whether rounding moves the outputs of `model` as far as `difference`: of its inputs, or within it.

    The latter decides all of an output that would be constant without it: BatchNorm in train mode over
    values that are equal up to their last digits.
    """
    if largest_difference(runner(model, runner.cast(values).map(_nudge)), expected) >= difference / 10:
        return True
    try:
        with OtherLastDigits():  # type: ignore[no-untyped-call]
            moved = runner(model, values)
    except ConfigError:
        return False
    return largest_difference(moved, expected) >= difference / 10


def _nudge(x: Tensor) -> Tensor:
    return x * (1 + max(_ROUNDING, 2 * torch.finfo(x.dtype).eps)) if x.is_floating_point() else x


def _affine(x: Tensor, scale: float, shift: float) -> Tensor:
    return (x * scale + shift).to(x.dtype) if x.is_floating_point() else x


def largest_difference(actual: Any, expected: Any) -> float:
    """Of all values of two outputs, relative to the largest magnitude of the tensor; inf if they do not fit.

    Values that are nan or infinite must be so in both. Numbers and booleans are compared like tensors.
    """
    one, other = _tensors(actual), _tensors(expected)
    if one.keys() != other.keys():
        return math.inf
    return max((_difference(one[name], tensor) for name, tensor in other.items()), default=0.0)


def _tensors(outputs: Any) -> dict[str, Tensor]:
    numbers = (bool, int, float, complex)
    return named_outputs(pytree.tree_map_only(numbers, torch.as_tensor, outputs))


def _difference(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or actual.dtype.is_floating_point != expected.dtype.is_floating_point:
        return math.inf
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected.to(actual.device)) else math.inf
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(7.0), expected[~finite].nan_to_num(7.0)):
        return math.inf
    actual, expected = actual[finite], expected[finite]
    if not expected.numel():
        return 0.0
    difference = float((actual - expected).abs().max())
    largest = float(expected.abs().max())
    return math.inf if math.isnan(difference) else difference / largest if largest else difference


# Where and why -------------------------------------------------------------------------------------


def _where(model: nn.Module, graph: nn.Module, values: Inputs, runner: _Runner) -> str:
    """The first module whose output differs, whose code is to blame, and the likely reason."""
    expected, actual = _observe(model, values, runner), _observe(graph, values, runner)
    for path, calls in expected.items():
        pairs = list(zip(actual.get(path, ()), calls, strict=False))
        if all(largest_difference(a[1], e[1]) <= runner.limit for a, e in pairs):
            continue
        same_inputs = all(largest_difference(a[0], e[0]) <= runner.limit for a, e in pairs)
        name = type(model.get_submodule(path)).__name__
        blamed = path if same_inputs else path.rpartition(".")[0]
        message = f"The first output that differs is that of {path} ({name})"
        message += "" if same_inputs else ", and its inputs differ already"
        return f"{message}. {_advice(model, blamed)}"
    return f"No module that it calls differs. {_advice(model, '')}"


def _varying(model: nn.Module, values: Inputs, runner: _Runner) -> str:
    """The path of the first module whose outputs vary from call to call though its inputs do not."""
    first, second = _observe(model, values, runner), _observe(model, values, runner)
    for path, calls in second.items():
        pairs = list(zip(first.get(path, ()), calls, strict=False))
        if any(
            largest_difference(a[0], b[0]) <= runner.limit < largest_difference(a[1], b[1]) for a, b in pairs
        ):
            return path
    return ""


class _Observed:
    """Path of each module that ran, in the order in which they finished -> (inputs, outputs) of its calls."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[Any, Any]]] = {}

    def keep(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        copies = pytree.tree_map_only(Tensor, torch.clone, ((args, kwargs), output))
        self.calls.setdefault(path, []).append(copies)


def _observe(model: nn.Module, values: Inputs, runner: _Runner) -> dict[str, list[tuple[Any, Any]]]:
    observed = _Observed()
    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):
                hook = functools.partial(observed.keep, path)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        runner(model, values)
    return observed.calls


def _advice(model: nn.Module, path: str) -> str:
    module = model.get_submodule(path)
    where = f"{path} ({type(module).__name__})" if path else f"{type(module).__name__}.forward"
    keep = f"leaves=[{path!r}] (--leaf {path}) keeps it as it is" if path else "rewrite that part of it"
    return f"Look at {where}: {likely_cause(module)}; {keep}."


#: what a forward mentions -> what it probably does that a trace does not
_SUSPECTS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"isinstance", "type", "hasattr", "is_tensor", "AttributeError"}), "it tests a value's type"),
    (frozenset({"random", "randint", "randn", "rand", "rand_like", "randperm"}), "it draws random numbers"),
    (frozenset({"data", "set_", "copy_"}), "it rewrites its weights"),
    (frozenset({"vars"}), "it looks at the attributes of a value"),
)  # fmt: skip


def likely_cause(module: nn.Module) -> str:
    """What in the forward of `module` a trace probably loses, in words."""
    if has_hooks(module) or any(has_hooks(child) for child in module.children()):
        return "a hook changes or keeps values"
    code = getattr(inspect.getattr_static(module, "forward", None), "__code__", None)
    codes = nested_codes(code) if isinstance(code, CodeType) else ()
    names = {name for nested in codes for name in nested.co_names}
    for suspects, reason in _SUSPECTS:
        if suspects & names:
            return reason
    if isinstance(code, CodeType) and _writes_in_place(code):
        return "it writes in place to a tensor that has two names (y = x; y /= 2)"
    return "Python state or control flow that depends on values is a likely cause"


def _writes_in_place(code: CodeType) -> bool:
    """Whether it has ``y += x``, ``y[i] = x``, or calls a method like ``y.add_(x)``."""
    operators = any(
        i.opname == "STORE_SUBSCR"
        or i.opname.startswith("INPLACE_")
        or (i.opname == "BINARY_OP" and i.argrepr.endswith("="))
        for i in dis.get_instructions(code)
    )
    return operators or any(name.endswith("_") and not name.startswith("_") for name in code.co_names)
