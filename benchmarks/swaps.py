"""The replacements of BatchNorm that there are without us."""

import copy
from typing import Any

from opacus.validators import ModuleValidator
from torch import nn


def opacus(network: nn.Module, **options: Any) -> nn.Module:
    """A copy in which opacus put GroupNorm, 32 groups unless `options` say else, with weight 1 and bias 0."""
    fixed: nn.Module = ModuleValidator.fix(network, **options)
    return fixed.train(network.training)


def group_norm(network: nn.Module, **options: Any) -> nn.Module:
    """The same with weight and bias of the BatchNorm, as those who swap by hand keep them."""
    swapped = copy.deepcopy(opacus(network, **options))
    swapped.load_state_dict(network.state_dict(), strict=False)  # the same names; statistics are left over
    return swapped
