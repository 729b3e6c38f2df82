"""Which BatchNorms a module calls as functions, read from its source: no other use of them is overlooked."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.inspection.functional_uses import calls_nothing_else, norms_called_as_functions

EPS = 1e-5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.plain = nn.BatchNorm2d(4, affine=False)


class Usual(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x,
            self.bn.running_mean,
            self.bn.running_var,
            self.bn.weight,
            self.bn.bias,
            False,
            0.1,
            self.bn.eps,
        )


class ByKeyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(
            input=x, running_var=self.bn.running_var, running_mean=self.bn.running_mean, eps=1e-5,
            training=self.training, bias=self.bn.bias, weight=self.bn.weight, momentum=self.bn.momentum,
        )  # fmt: skip


class OfTorch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var, self.bn.training, 0.1,
            self.bn.eps, torch.backends.cudnn.enabled,
        )  # fmt: skip


class Twice(Net):
    """In itself, in another method, and as a module."""

    def half(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            F.relu(self.half(x)), self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias
        )
        return self.other(self.bn(x))


class WithoutAffine(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.plain.running_mean, self.plain.running_var)


class Inherits(Usual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("make", [Usual, ByKeyword, OfTorch, Twice, Inherits])
def test_calls_with_the_tensors_of_a_batch_norm_are_understood(make: Callable[[], nn.Module]) -> None:
    assert norms_called_as_functions(make()) == {"bn"}
    assert calls_nothing_else(make())


def test_a_batch_norm_without_weights_may_be_given_none() -> None:
    assert norms_called_as_functions(WithoutAffine()) == {"plain"}


# What is computed is something else than the BatchNorm computes, or the tensors are also used otherwise.


class OnlyRead(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.bn.running_var.sum()


class OtherEps(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, False, 0.1, 1e-3
        )


class ComputedEps(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, eps=EPS * 2
        )


class OfTheBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, True)


class ModeOfAnother(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, self.other.training
        )


class NoWeight(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var)


class NoBias(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight)


class MixedOwners(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.other.running_var, self.bn.weight, self.bn.bias)


class WeightOfAnother(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.other.weight, self.other.bias)


class Swapped(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_var, self.bn.running_mean, self.bn.weight, self.bn.bias)


class Computed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight.abs(), self.bn.bias)


class AlsoRead(Usual):
    def penalty(self) -> Tensor:
        return self.bn.weight.abs().sum()


class AlsoReadInTheInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x * self.bn.running_var.sum(),
            self.bn.running_mean,
            self.bn.running_var,
            self.bn.weight,
            self.bn.bias,
        )


class AlsoByName(Usual):
    def norm(self) -> Any:
        return getattr(self, "bn")  # noqa: B009  # the point


class AlsoAnotherFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        return F.instance_norm(y, self.bn.running_mean, self.bn.running_var)


class Starred(Net):
    def forward(self, x: Tensor) -> Tensor:
        more = (False,)
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, *more)


class Hides(Net):
    """F is not torch.nn.functional here."""

    def forward(self, x: Tensor, F: Any) -> Tensor:  # noqa: N803
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)


class OtherSelf(Net):
    """self is not the module here."""

    def forward(self, x: Tensor) -> Tensor:
        self = self.other  # type: ignore[assignment]  # noqa: PLW0642  # the point
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)


class Local(Net):
    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)


class Native(Net):
    def forward(self, x: Tensor) -> Tensor:
        y, mean, _ = torch.native_batch_norm(
            x, self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var, False, 0.1, 1e-5
        )
        return y + mean.sum()


class InALambda(Usual):
    scale = lambda self: self.bn.weight  # noqa: E731


class InAPartial(Usual):
    scale = functools.partialmethod(lambda self: self.bn.weight)


class InAHeldFunction(Usual):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [lambda power: self.bn.weight.pow(power).sum()]

    def scale(self) -> Tensor:
        return self.scales[0](2)


class InAHook(Usual):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda module, args, output: output * module.bn.weight.sum())  # type: ignore[attr-defined]


REFUSED = [
    OnlyRead, OtherEps, ComputedEps, OfTheBatch, ModeOfAnother, NoWeight, NoBias, MixedOwners,
    WeightOfAnother, Swapped, Computed, AlsoRead, AlsoReadInTheInput, AlsoByName, AlsoAnotherFunction,
    Starred, Hides, OtherSelf, Local, Native, InALambda, InAPartial, InAHeldFunction, InAHook,
]  # fmt: skip


@pytest.mark.parametrize("make", REFUSED)
def test_any_other_use_is_noticed(make: Callable[[], nn.Module]) -> None:
    assert norms_called_as_functions(make()) == frozenset()


def test_code_without_source_is_not_understood() -> None:
    names: dict[str, Any] = {"Net": Net, "F": F}
    text = """
class Hidden(Net):
    def forward(self, x):
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
"""
    exec(text, names)
    assert norms_called_as_functions(names["Hidden"]()) == frozenset()


def test_a_forward_of_its_own_is_not_understood() -> None:
    net = Usual()
    net.forward = lambda x: x  # type: ignore[method-assign]
    assert norms_called_as_functions(net) == frozenset()


def test_a_subclass_of_batch_norm_may_compute_something_else() -> None:
    net = Usual()
    net.bn = type("Own", (nn.BatchNorm2d,), {})(4)
    assert norms_called_as_functions(net) == frozenset()


# Other calls of batch_norm


def helper(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


class ByHelper(Usual):
    def again(self, x: Tensor) -> Tensor:
        return helper(x)


class Direct(Usual):
    def again(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class Named(Usual):
    def again(self, x: Tensor) -> Tensor:
        function = getattr(F, "batch_norm")  # noqa: B009  # the point
        return function(x, None, None, training=True)


class ImportedInside(Usual):
    def again(self, x: Tensor) -> Tensor:
        from torch.nn.functional import batch_norm as inside

        return inside(x, None, None, training=True)


class Held(Usual):
    def __init__(self) -> None:
        super().__init__()
        self.function = helper


@pytest.mark.parametrize("make", [ByHelper, Direct, Named, ImportedInside, Held])
def test_other_calls_of_batch_norm_are_noticed(make: Callable[[], nn.Module]) -> None:
    assert norms_called_as_functions(make()) == {"bn"}
    assert not calls_nothing_else(make())
