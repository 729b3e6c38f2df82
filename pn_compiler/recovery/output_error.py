"""How far a network is from its teacher, as a function of the weight and bias of its normalizers."""

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
    """sum |s - t|^2 / sum |t|^2 over all samples, with s the outputs of a student and t those of its teacher.

    Of several floating-point outputs it is the sum. Outputs that cannot be compared value by value, such as
    boxes after a non-maximum suppression, are replaced by what the sites give. It is a sum over samples, so
    parts of them can be computed elsewhere; memory does not grow with their number.

    Args:
        student, teacher: called as they are.
        norms: normalizers of the student, by path; the teacher has BatchNorms there.
        powers: sum |t|^2 of each output by its place, and of each site by its path.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, norms: Norms, powers: Mapping[str, float]
    ) -> None:
        self.student, self.teacher, self._norms, self._powers = student, teacher, norms, powers
        self._sites: tuple[str, ...] | None = None  # what is compared: none of them, that is, the outputs

    def __call__(self, batches: Batches) -> tuple[float, Tensor]:
        """(error, its gradient) at the weight and bias that the sites have; the gradient as `values_of`."""
        parameters = _parameters(self._norms)
        gradient = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        total = 0.0
        with torch.enable_grad(), _following(self._norms):
            for name, inputs in batches:
                loss = self._loss(inputs, name)
                total += float(loss.detach())
                found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                gradient = [old + new for old, new in zip(gradient, found, strict=True)]
        return total, torch.cat([part.cpu() for part in gradient])

    def _loss(self, inputs: Inputs, name: str) -> Tensor:
        if self._sites is None:
            self._sites = () if self._comparable(inputs, name) else tuple(self._norms)
        with torch.no_grad():
            wanted = observed(self.teacher, self._sites, inputs.map(torch.clone), name)
        got = observed(self.student, self._sites, inputs.map(torch.clone), name)
        if wanted.keys() != got.keys():
            raise ConfigError(f"the networks take different ways on {name}: calibrate the part before that")
        return torch.stack([
            (got[place].double() - target.double()).square().sum() / (self._powers.get(owner(place)) or 1.0)
            for place, target in wanted.items()
            if got[place].shape == target.shape
        ]).sum()  # fmt: skip

    def _comparable(self, inputs: Inputs, name: str) -> bool:
        """Whether outputs have one entry for each sample, and depend on the sites."""
        with torch.no_grad():
            wanted = observed(self.teacher, (), inputs.map(torch.clone), name)
        got = observed(self.student, (), inputs.map(torch.clone), name)
        first = next((x for x in inputs.tensors() if x.dim()), None)
        size = None if first is None else len(first)
        return (
            bool(got)
            and wanted.keys() == got.keys()
            and all(
                x.dim() > 0 and len(x) == size and x.shape == wanted[place].shape and x.requires_grad
                for place, x in got.items()
            )
        )


def observed(model: nn.Module, sites: Iterable[str], inputs: Inputs, name: str) -> dict[str, Tensor]:
    """What the modules `sites` give, by path and call; without any, the outputs of `model` by their place.

    Raises:
        ConfigError: with the `name` of the inputs, the model does not run on them.
    """
    found: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, args: Any, output: Tensor) -> None:
        calls = sum(owner(place) == path for place in found)
        found[f"{path} {calls + 1}"] = output.clone()  # what follows may work in place

    with contextlib.ExitStack() as stack:
        for path in sites:
            hook = model.get_submodule(path).register_forward_hook(functools.partial(keep, path))
            stack.callback(hook.remove)
        outputs = run(model, inputs, name)
    if not sites:
        found = {k: x for k, x in named_outputs(outputs).items() if x.is_floating_point()}
    return found


def values_of(norms: Norms) -> Tensor:
    """Weight and bias of all sites, one site after the other, float64 [2 C] on the CPU."""
    return torch.cat([p.detach().double().cpu() for p in _parameters(norms)])


def _parameters(norms: Norms) -> list[Tensor]:
    return [p for norm in norms.values() for p in (norm.weight, norm.bias)]


@torch.no_grad()
def put(norms: Norms, values: Tensor) -> None:
    """Gives the sites weight and bias; `values` are as those of `values_of`."""
    parameters = _parameters(norms)
    for parameter, part in zip(parameters, torch.split(values, [len(p) for p in parameters]), strict=True):
        parameter.copy_(part)


@contextlib.contextmanager
def _following(norms: Norms) -> Iterator[None]:
    """Weights and biases have gradients; inputs of sites that need none are contiguous.

    On channels-last inputs that need no gradient the backward of group_norm crashes in torch 2.13.
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
    """The path of a site without the number of its call; places of outputs hold no blank."""
    return place.partition(" ")[0]
