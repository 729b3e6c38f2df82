"""Code that calls batch_norm is found, however it names it; what only looks like it is not."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.functional import batch_norm
from torch.nn.functional import batch_norm as renamed

from pn_compiler.inspection.functional_norms import calls_batch_norm

ATEN = torch.ops.aten


def helper(x: Tensor) -> Tensor:
    return deeper(x)


def deeper(x: Tensor) -> Tensor:
    return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


def imports_inside(x: Tensor) -> Tensor:
    import torch.nn.functional as functional

    return functional.batch_norm(x, None, None)


def imports_name(x: Tensor) -> Tensor:
    from torch.nn.functional import batch_norm as inside

    return inside(x, None, None)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None)


def closure() -> Callable[..., Any]:
    function = F.batch_norm
    return lambda x: function(x, None, None)


TABLE = {"batch": F.batch_norm, "instance": F.instance_norm}
CALLS: dict[str, Callable[..., Any]] = {
    "F": lambda self, x: F.batch_norm(x, None, None),
    "dotted": lambda self, x: torch.nn.functional.batch_norm(x, None, None),
    "torch": lambda self, x: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0],
    "name": lambda self, x: batch_norm(x, None, None),
    "other name": lambda self, x: renamed(x, None, None),
    "packet": lambda self, x: torch.ops.aten.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0],
    "overload": lambda self, x: ATEN._native_batch_norm_legit.no_stats(x, None, None, True, 0.1, 1e-5)[0],
    "helper": lambda self, x: helper(x),
    "decorated helper": lambda self, x: decorated(helper)(x),
    "decorated forward": decorated(lambda self, x: helper(x)),
    "import inside": lambda self, x: imports_inside(x),
    "import of a name": lambda self, x: imports_name(x),
    "autograd": lambda self, x: Function.apply(x),
    "comprehension": lambda self, x: [F.batch_norm(y, None, None) for y in x.chunk(2)],
    "inner function": lambda self, x: (lambda y: F.batch_norm(y, None, None))(x),
    "getattr": lambda self, x: getattr(F, "batch_norm")(x, None, None),  # noqa: B009
    "closure": closure(),
    "table": lambda self, x: TABLE["batch"](x, None, None),
    "partial": functools.partial(F.batch_norm, running_mean=None, running_var=None),
}


@pytest.mark.parametrize("how", CALLS)
def test_calls_are_found(how: str) -> None:
    module = type("Norm", (nn.Module,), {"forward": CALLS[how], "__module__": __name__})()
    assert calls_batch_norm(module)


class Method(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x)

    def normalized(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class Inherits(Method):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Holds(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def hooked() -> nn.Module:
    module = nn.Conv2d(1, 1, 1)
    module.register_forward_hook(lambda module, args, output: F.batch_norm(output, None, None))
    return module


@pytest.mark.filterwarnings("ignore")
def test_methods_held_functions_hooks_and_graphs_are_followed() -> None:
    for module in (
        Method(),
        Inherits(),
        Holds(F.batch_norm),
        Holds(helper),
        hooked(),
        fx.symbolic_trace(Method()),
    ):
        assert calls_batch_norm(module), module
    assert calls_batch_norm(torch.jit.trace(Method(), torch.ones(2, 1)))


class LooksLikeIt(nn.Module):
    """Children of that name, and a method that forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm, self.blocks = nn.BatchNorm2d(1), nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x if isinstance(block, Method) else block.batch_norm(x)
        return F.instance_norm(self.batch_norm(x))

    def fuse(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None)


@pytest.mark.parametrize("module", [LooksLikeIt(), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1), Holds(F.relu)])
def test_children_and_layers_of_torch_are_no_calls(module: nn.Module) -> None:
    assert not calls_batch_norm(module)


def test_values_of_any_kind_are_looked_at_without_end() -> None:
    """A hook may have stored what a trace gave it, whose every attribute is another proxy."""
    module = Holds(F.relu)
    graph = fx.Graph()
    module.kept = {"proxy": fx.Proxy(graph.placeholder("x"))}  # type: ignore[assignment]
    module.one = fx.Proxy(graph.placeholder("y"))  # type: ignore[assignment]
    assert not calls_batch_norm(module)
