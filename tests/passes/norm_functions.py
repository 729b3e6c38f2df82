"""Modules that call batch_norm as a function, and what they compute by hand."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pn_compiler.inspection.functional_norms import is_batch_norm_function

X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


Call = Callable[[Any, Tensor], Tensor]


class Norm(nn.Module):
    """In-place ABN and its kind: parameters and buffers of any name, and a function."""

    def __init__(
        self, call: Call, names: tuple[str, ...] = ("weight", "bias", "running_mean", "running_var")
    ):
        super().__init__()
        self.call, self.names, self.track_running_stats = (
            (call,),
            names,
            True,
        )  # a tuple: nn.Module binds none
        g = torch.Generator().manual_seed(0)
        low = (0.5, -0.3, -0.3, 0.5)
        for place, (name, start) in enumerate(zip(names, low, strict=True)):
            value = start + torch.rand(8, generator=g, dtype=torch.float64)
            if place < 2:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.call[0](self, x))


def functional(self: Norm, x: Tensor) -> Tensor:
    w, b, m, v = self.tensors
    return F.batch_norm(x, m, v, w, b, self.training, 0.1, 1e-3)


def layers(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 2, 1)).double()


def by_hand(norm: Norm) -> nn.Sequential:
    """The same network with nn.BatchNorm2d and nn.LeakyReLU."""
    plain = nn.BatchNorm2d(8, eps=1e-3).double()
    state = dict(zip(("weight", "bias", "running_mean", "running_var"), norm.tensors, strict=True))
    plain.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
    return layers(nn.Sequential(plain, nn.LeakyReLU()))


def left(model: nn.Module, x: Tensor) -> int:
    """How many batch_norm functions run in `model`."""

    class Counts(torch.overrides.TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += is_batch_norm_function(func)
            return func(*args, **(kwargs or {}))

    with Counts() as counts, torch.no_grad():
        model(x)
    return counts.count
