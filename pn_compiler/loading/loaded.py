"""What loading a file gives."""

import dataclasses

from torch import nn

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.running.inputs import Inputs


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a model file holds.

    Attributes:
        model: the model, in the mode in which it was saved.
        inputs: the inputs that a program was exported with, or None.
        fixed_batch: the fixed batch size of an exported program, or None.
        notes: what the user must know of how it was read, such as which weights of a checkpoint were taken.
    """

    model: nn.Module
    inputs: Inputs | None = None
    fixed_batch: int | None = None
    notes: tuple[Diagnostic, ...] = ()
