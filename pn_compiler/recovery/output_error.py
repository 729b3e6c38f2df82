"""The distance between a network and its teacher, as a function of its normalizers' weight and bias."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.recovery.site_constants import Norms
from pn_compiler.running.evaluation import run
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.losses import named_outputs

Batches = Iterable[tuple[str, Inputs]]  # name of each, and the arguments


class OutputError:
    """sum |s - t|^2 / sum |t|^2 over all samples, where s are the student's outputs and t the teacher's.

    With several floating-point outputs, their errors are added up. Where outputs cannot be compared value by
    value, such as boxes after a non-maximum suppression, the outputs of the sites are compared instead. The
    error is a sum over samples, so shards can be evaluated elsewhere; memory does not grow with their number.

    Args:
        student, teacher: run in the mode in which they are.
        norms: normalizers of the student, by path; the teacher has BatchNorms there.
        powers: sum |t|^2 of each output by its place, and of each site by its path.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, norms: Norms, powers: Mapping[str, float]
    ) -> None:
        self.student, self.teacher, self._norms, self._powers = student, teacher, norms, powers
        self._sites: tuple[str, ...] | None = None  # whose outputs are compared; (): the model's outputs

    def __call__(self, batches: Batches) -> tuple[float, Tensor]:
        """(error, gradient) at the sites' current weight and bias; the gradient laid out as `values_of`."""
        parameters = _parameters(self._norms)
        gradient = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        total = 0.0
        with torch.enable_grad(), _following(self._norms):
            for name, inputs in batches:
                loss = self._loss(inputs, name)
                total += float(loss.detach())
                parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                gradient = [old + new for old, new in zip(gradient, parts, strict=True)]
        return total, torch.cat([part.cpu() for part in gradient])

    def _loss(self, inputs: Inputs, name: str) -> Tensor:
        if self._sites is None:
            self._sites = () if self._comparable(inputs, name) else tuple(self._norms)
        with torch.no_grad():
            expected = observed(self.teacher, self._sites, inputs.map(torch.clone), name)
        actual = observed(self.student, self._sites, inputs.map(torch.clone), name)
        if expected.keys() != actual.keys():
            raise ConfigError(
                f"the networks take different branches on {name}: calibrate the part before the branch"
            )
        return torch.stack([
            (actual[place].double() - t.double()).square().sum() / (self._powers.get(owner(place)) or 1.0)
            for place, t in expected.items()
            if actual[place].shape == t.shape
        ]).sum()  # fmt: skip

    def _comparable(self, inputs: Inputs, name: str) -> bool:
        """Whether the outputs have one entry per sample and depend on the sites."""
        with torch.no_grad():
            expected = observed(self.teacher, (), inputs.map(torch.clone), name)
        actual = observed(self.student, (), inputs.map(torch.clone), name)
        first = next((x for x in inputs.tensors() if x.dim()), None)
        size = None if first is None else len(first)
        return (
            bool(actual)
            and expected.keys() == actual.keys()
            and all(
                x.dim() > 0 and len(x) == size and x.shape == expected[place].shape and x.requires_grad
                for place, x in actual.items()
            )
        )


def observed(model: nn.Module, sites: Iterable[str], inputs: Inputs, name: str) -> dict[str, Tensor]:
    """Outputs of the modules `sites`, by path and call; without any, the outputs of `model` by their place.

    Raises:
        ConfigError: the model does not run on the inputs; the message says their `name`.
    """
    results: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, args: Any, output: Tensor) -> None:
        calls = sum(owner(place) == path for place in results)
        results[f"{path} {calls + 1}"] = output.clone()  # later layers may modify it in place

    with contextlib.ExitStack() as stack:
        for path in sites:
            hook = model.get_submodule(path).register_forward_hook(functools.partial(keep, path))
            stack.callback(hook.remove)
        outputs = run(model, inputs, name)
    if not sites:
        results = {k: x for k, x in named_outputs(outputs).items() if x.is_floating_point()}
    return results


def values_of(norms: Norms) -> Tensor:
    """Weight and bias of all sites, concatenated site by site, float64 on the CPU: 2 C values for each."""
    return torch.cat([p.detach().double().cpu() for p in _parameters(norms)])


def _parameters(norms: Norms) -> list[Tensor]:
    return [p for norm in norms.values() for p in (norm.weight, norm.bias)]


@torch.no_grad()
def put(norms: Norms, values: Tensor) -> None:
    """Sets weight and bias of the sites from `values`, laid out as `values_of` returns them."""
    parameters = _parameters(norms)
    for parameter, part in zip(parameters, torch.split(values, [len(p) for p in parameters]), strict=True):
        parameter.copy_(part)


@contextlib.contextmanager
def _following(norms: Norms) -> Iterator[None]:
    """Lets weights and biases require gradients; makes inputs that require none contiguous.

    In torch 2.13 the backward of group_norm crashes on channels-last inputs that require no gradient.
    """

    def straighten(norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        return (x if x.requires_grad else x.contiguous(),)

    parameters = _parameters(norms)
    with contextlib.ExitStack() as stack:
        for norm in norms.values():
            stack.callback(norm.register_forward_pre_hook(straighten).remove)
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_()
        yield


def owner(place: str) -> str:
    """The path of a site without its call number; an output's place has no space in it."""
    return place.partition(" ")[0]
