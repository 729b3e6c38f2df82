"""Rules for every text in torch's schema of an exported program.

A field without a rule here must not hold text: what a later version of torch adds is refused until it gets a
rule.
"""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import torch

from pn_compiler.loading.pickle_audit import SAFE_NAME
from pn_compiler.loading.size_expressions import is_size_expression

_IDENTIFIER = re.compile(r"(?!__)[A-Za-z_]\w{0,500}", re.ASCII)
_RESERVED = frozenset(["self", "torch", "getattr", "fx_pytree", "pytree"])  # what generated source uses
_OPERATOR = re.compile(r"torch\.ops\.(aten|prims)\.((?!__)\w+)\.(\w+)", re.ASCII)
_PRIVATE_OPERATORS = frozenset(
    [
        "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_assert_scalar", "_assert_tensor_metadata", "_conj",
        "_convolution", "_fft_c2c", "_fft_c2r", "_fft_r2c", "_local_scalar_dense", "_log_softmax",
        "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
        "_native_batch_norm_legit_no_training", "_native_multi_head_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_softmax", "_to_copy",
        "_transformer_encoder_layer_fwd", "_unsafe_index", "_unsafe_view", "_upsample_bicubic2d_aa",
        "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
        "_upsample_nearest_exact3d", "_weight_norm", "_weight_norm_interface",
    ]
)  # fmt: skip  # other private ones trust their caller with sizes and indices
_NO_TENSORS = frozenset(
    ["_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size", "scalar_tensor"]
    + ["promote_types", "can_cast"]  # of dtypes, as converted networks ask
)
_OTHER_OPERATORS = frozenset(
    [f"torch.ops.higher_order.{n}" for n in ("cond", "wrap_with_set_grad_enabled", "wrap_with_autocast")]
    + [f"torch.{n}" for n in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_sqrt", "sym_ite")]
    + [
        f"_operator.{n}"
        for n in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "eq", "ne")
    ]
    + [f"_operator.{n}" for n in ("lt", "le", "gt", "ge", "and_", "or_", "getitem")]
    + ["torch._sym_sqrt", "math.trunc", "math.ceil", "math.floor"]
)
_TREES = frozenset(["builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"])
_METADATA = frozenset(
    ["stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node"]
)
_LONGEST = 2**20  # characters of a text that nothing reads
_DEEPEST = 50


def is_identifier(text: str) -> bool:
    return bool(_IDENTIFIER.fullmatch(text)) and text not in _RESERVED


def is_module_path(text: str) -> bool:
    """Dotted names of submodules; the last may be that of a parameter."""
    parts = text.split(".")
    return len(parts) <= _DEEPEST and all(
        SAFE_NAME.fullmatch(part) and not part.startswith("__") and not hasattr(torch.nn.Module, part)
        for part in parts
    )


def is_harmless_operator(target: str) -> bool:
    """Whether `target` computes tensors or sizes and does nothing else."""
    match = _OPERATOR.fullmatch(target)
    return _is_tensor_operator(*match.groups()) if match else target in _OTHER_OPERATORS


@functools.cache
def _is_tensor_operator(library: str, name: str, overload: str) -> bool:
    if name.startswith("_") and name not in _PRIVATE_OPERATORS:
        return False
    packet = getattr(getattr(torch.ops, library), name, None)
    operator = getattr(packet, overload, None)
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    arguments = operator._schema.arguments
    if any(argument.name == "filename" or "Storage" in str(argument.type) for argument in arguments):
        return False
    values = [*arguments, *operator._schema.returns]
    return name in _NO_TENSORS or any("Tensor" in str(value.type) for value in values)


def _is_call_path(text: str) -> bool:
    """The path of a module, and the number of its call."""
    path, _, call = text.partition("@")
    return not text or (is_module_path(path) and (not call or call.isdecimal()))


def _is_tree(text: str) -> bool:
    """A treespec of tuples, lists and dictionaries; for other types torch would import what they name."""
    try:
        protocol, tree = json.loads(text)
        return protocol == 1 and _is_node(tree, 0)
    except (ValueError, TypeError, RecursionError):
        return False


def _is_node(tree: Any, depth: int) -> bool:
    if not isinstance(tree, dict) or tree.keys() != {"type", "context", "children_spec"} or depth > _DEEPEST:
        return False
    kind, context, children = tree["type"], tree["context"], tree["children_spec"]
    if kind is None:
        return context is None and children == []
    if kind not in _TREES or not isinstance(children, list) or not isinstance(context, str):
        return False
    keys = json.loads(context)
    if keys is not None and not (isinstance(keys, list) and all(type(k) in (str, int) for k in keys)):
        return False
    return (keys is None or len(keys) == len(children)) and all(_is_node(c, depth + 1) for c in children)


def _is_note(text: str) -> bool:
    """Text that is kept beside the graph and becomes neither a name nor code."""
    return len(text) <= _LONGEST


def _is_value(text: str) -> bool:
    """The value of an option, such as a rounding mode or the equation of einsum."""
    return len(text) <= 1000 and text.isprintable()


def _one_of(*texts: str) -> Callable[[str], bool]:
    return lambda text: text in texts


def _nothing(text: str) -> bool:
    return False


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: bool(re.fullmatch(pattern, text, re.ASCII))


#: Class and field -> whether the text is harmless there.
TEXTS: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(
        ["TensorArgument.name", "SymIntArgument.as_name", "SymFloatArgument.as_name", "GraphArgument.name",
         "SymBoolArgument.as_name", "UserInputMutationSpec.user_input_name", "Node.name",
         "GradientToUserInputSpec.user_input_name", "ModuleCallSignature.forward_arg_names"],
        is_identifier,
    ),
    "NamedArgument.name": _matches(r"|(?!__)[A-Za-z_]\w{0,100}"),  # of an operator, such as self
    "InputToConstantInputSpec.name": lambda text: not text or is_identifier(text),
    **dict.fromkeys(
        ["InputToParameterSpec.parameter_name", "InputToBufferSpec.buffer_name",
         "InputToTensorConstantSpec.tensor_constant_name", "BufferMutationSpec.buffer_name",
         "ParameterMutationSpec.parameter_name", "GradientToParameterSpec.parameter_name"],
        is_module_path,
    ),
    "ModuleCallEntry.fqn": _is_call_path,
    **dict.fromkeys(["Node.target", "Argument.as_operator"], is_harmless_operator),
    "SymExpr.expr_str": is_size_expression,
    **dict.fromkeys(["Argument.as_string", "Argument.as_strings", "ConstantValue.as_string"], _is_value),
    "Device.type": _one_of("cpu", "cuda", "mps", "xpu"),
    **dict.fromkeys(["ModuleCallSignature.in_spec", "ModuleCallSignature.out_spec"], _is_tree),
    **dict.fromkeys(["Node.metadata", "GraphModule.metadata", "ExportedProgram.guards_code"], _is_note),
    "ExportedProgram.verifiers": _one_of("TRAINING", "ATEN", ""),
    "ExportedProgram.torch_version": _matches(r"[\w.+<= -]{1,100}"),
    "PayloadMeta.path_name": _matches(r"\w{1,100}"),
}  # fmt: skip

#: The same for the keys of dictionaries.
KEYS: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(
        [f"Graph.{kind}_values" for kind in ("tensor", "sym_int", "sym_bool", "sym_float")], is_identifier
    ),
    "Graph.custom_obj_values": _nothing,
    "GraphModule.treespec_namedtuple_fields": _nothing,
    "GraphModule.metadata": _one_of("custom"),
    "Node.metadata": lambda key: key in _METADATA,
    "Argument.as_string_to_argument": is_identifier,
    "ExportedProgram.opset_version": _matches(r"\w{1,100}"),
    "ExportedProgram.range_constraints": is_size_expression,
    "PayloadConfig.config": is_module_path,
}
