"""Whether an operation of ours may stand for the operators that it is composed of."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pn_compiler.numerics.quadrature import is_transformed


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Whether PyTorch computes these tensors right here, as values, and differentiates at most backward.

    Then an `autograd.Function` and in-place operators save time. Compilers fuse the composed operators
    themselves, and `torch.func`, forward-mode differentiation, tracers and tensors of other classes (fake,
    sharded) need them.
    """
    if is_transformed() or torch._C._get_tracing_state() is not None or forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack():  # a mode that looks at operators, such as make_fx
        return False
    return all(tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
