"""Networks in float16 or bfloat16, with inputs, outputs and statistics in float32."""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import one_of
from pn_compiler.nn import AnchoredNorm, FoldedNorm

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CONV_OPSET = 22  # the first whose Conv takes bfloat16
_NORMALIZERS = (nn.GroupNorm, nn.LayerNorm, _NormBase, AnchoredNorm, FoldedNorm)


def check_dtype(dtype: str, opset_version: int) -> None:
    """Raises ConfigError if there is no such dtype, or ONNX has no convolutions of it in that opset."""
    one_of("dtype", dtype, tuple(DTYPES))
    if dtype == "bfloat16" and opset_version < _CONV_OPSET:
        raise ConfigError(
            f"opset {opset_version} has no convolution in bfloat16: give opset {_CONV_OPSET} or later"
        )


class InFloat32(nn.Module):
    """A normalizer that computes in float32 whatever the dtype of its input, which its output has, too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x.float()).to(x.dtype)
        return result


def in_half(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` with weights and activations in `dtype`, and normalizers in float32.

    Float inputs are cast to `dtype`, and float outputs to float32.
    """
    model = copy.deepcopy(model)
    normalizers = [
        (path, copy.deepcopy(module))
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _NORMALIZERS)
    ]
    model.to(dtype)
    for path, module in normalizers:  # with parameters that were not rounded
        model.set_submodule(path, InFloat32(module))
    if isinstance(model, fx.GraphModule):
        _cast_in_graph(model, dtype)
    else:
        model.register_forward_pre_hook(functools.partial(_cast_inputs, dtype), with_kwargs=True)
        model.register_forward_hook(_widen_outputs)
    return model


def _cast_in_graph(gm: fx.GraphModule, dtype: torch.dtype) -> None:
    """torch.export interprets a graph, node by node: it never calls its hooks."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node in placeholders:
        with gm.graph.inserting_after(placeholders[-1]):
            cast = gm.graph.call_function(_cast, (node, dtype))
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(_cast, (output.args[0], torch.float32)),)
    gm.recompile()


def _cast_inputs(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return _cast((args, kwargs), dtype)


def _widen_outputs(module: nn.Module, args: Any, outputs: Any) -> Any:
    return _cast(outputs, torch.float32)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, values)
