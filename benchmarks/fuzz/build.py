"""From a program to a live network and its inputs."""

import hashlib
import linecache
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.fuzz.program import Program, source
from pn_compiler.testing import randomize_batch_norms

_MODULE = "benchmarks_fuzz_network"


def build(program: Program) -> nn.Module:
    """The network with random weights and running statistics, in eval mode. Raises what its code raises.

    Its source can be inspected, as that of a user's file can.
    """
    text = source(program)
    filename = f"<network {hashlib.sha1(text.encode()).hexdigest()}>"
    module = types.ModuleType(_MODULE)
    module.__file__ = filename
    sys.modules[_MODULE] = module  # where inspect looks for the file of a class
    for stale in [name for name in linecache.cache if name.startswith("<network ")]:
        del linecache.cache[stale]
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec"), vars(module))
    torch.manual_seed(program.seed)
    return initialise(module.Net(), program.seed, program.options.gain).to(dtype_of(program))


def dtype_of(program: Program) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, program.options.dtype)
    return dtype


@torch.no_grad()
def initialise(model: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Gives each BatchNorm, functional ones included, random parameters and statistics; in eval mode.

    `gain` multiplies the weights, alternately by itself and by 1: sites with large and with usual values.
    """
    randomize_batch_norms(model, seed)
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
    for index, module in enumerate(norms):
        if not isinstance(module, _BatchNorm):  # functional batch norm in a class of its own
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(module.weight, Tensor) and index % 2 == 0:
            module.weight.mul_(gain)
    return model.eval()


def inputs_of(program: Program, scale: float = 1.0, shift: float = 0.0, batch: int = 3) -> tuple[Any, ...]:
    """Arguments of a call, always the same for a program."""
    generator = torch.Generator().manual_seed(program.seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _, shape in program.inputs]
    tensors = tuple((x[:batch] * scale + shift).to(dtype_of(program)) for x in drawn)
    return program.arguments(tensors)
