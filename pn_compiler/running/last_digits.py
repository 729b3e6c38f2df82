"""Runs a model with other last digits, to see how much it magnifies rounding."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ULPS = 4  # by which a result is moved at most: kernels for other layouts differ by that

#: ATen operators whose last digits depend on the kernel, and so on the layout of what they read. Results of
#: the others are exact or correctly rounded: to move those would also tear ties apart, as x == x.amax() has.
_ROUNDING = frozenset(
    [
        "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_softmax", "_log_softmax",
        "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "addbmm", "addmm",
        "avg_pool2d", "avg_pool3d", "baddbmm", "bmm", "celu", "convolution", "cos", "cumsum", "elu", "erf",
        "exp", "expm1", "gelu", "linalg_vector_norm", "log", "log1p", "log_sigmoid_forward", "logsumexp",
        "mean", "mish", "mm", "native_batch_norm", "native_group_norm", "native_layer_norm", "norm", "pow",
        "prod", "rsqrt", "sigmoid", "silu", "sin", "softplus", "std", "sum", "tanh", "upsample_bicubic2d",
        "upsample_bilinear2d", "var", "var_mean",
    ]
)  # fmt: skip


class OtherLastDigits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own __init_subclass__
    """While active, moves results of operators that round by a few units in the last place."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::").removesuffix("_") in _ROUNDING:
            value = result if isinstance(result, Tensor) else result[0]
            if value.is_floating_point():
                value.mul_(_near_one(value))
        return result


def _near_one(value: Tensor) -> Tensor:
    """Factors within a few units in the last place of 1, another for each element of `value`."""
    pattern = torch.cos(torch.arange(value.numel(), device=value.device, dtype=torch.float64))
    return (1 + _ULPS * torch.finfo(value.dtype).eps * pattern).to(value.dtype).view(value.shape)
