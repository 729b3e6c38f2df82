"""ONNX's names for the operators of a traced network, so that one operator has one name in a table."""

import re
from collections import Counter
from collections.abc import Mapping

#: What torch calls it, in lower case without underscores and dimensions -> what ONNX does.
_NAMES = {
    "adaptiveavgpool": "ReduceMean",
    "adaptivemaxpool": "ReduceMax",
    "amax": "ReduceMax",
    "amin": "ReduceMin",
    "avgpool": "AveragePool",
    "batchnorm": "BatchNormalization",
    "cat": "Concat",
    "chunk": "Split",
    "clamp": "Clip",
    "convtranspose": "ConvTranspose",
    "flatten": "Reshape",
    "floordiv": "Div",
    "groupnorm": "GroupNormalization",
    "hardsigmoid": "HardSigmoid",
    "hardswish": "HardSwish",
    "hardtanh": "Clip",
    "iadd": "Add",
    "imul": "Mul",
    "instancenorm": "InstanceNormalization",
    "interpolate": "Resize",
    "layernorm": "LayerNormalization",
    "leakyrelu": "LeakyRelu",
    "linear": "Gemm",
    "logsoftmax": "LogSoftmax",
    "matmul": "MatMul",
    "maxpool": "MaxPool",
    "mean": "ReduceMean",
    "multiply": "Mul",
    "permute": "Transpose",
    "prelu": "PRelu",
    "relu6": "Clip",
    "syncbatchnorm": "BatchNormalization",
    "truediv": "Div",
    "upsample": "Resize",
    "view": "Reshape",
}
_PLAIN = (  # those that differ in nothing else
    "Add", "Concat", "Conv", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu", "Identity", "Log",
    "Mish", "Mul", "Pad", "Pow", "Relu", "Reshape", "Selu", "Sigmoid", "Slice", "Softmax", "Softplus",
    "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
)  # fmt: skip
_NAMES |= {name.lower(): name for name in _PLAIN}
_GONE = frozenset({"dropout", "featuredropout", "identity"})  # they do nothing in a file


def onnx_names(counts: Mapping[str, int]) -> dict[str, int]:
    """How often each operator is there, under ONNX's names where it has them; no-ops are left out."""
    found: Counter[str] = Counter()
    for name, count in counts.items():
        plain = re.sub(r"(?<=[a-z])[123]d$", "", name.replace("_", "").lower())
        if plain not in _GONE:
            found[_NAMES.get(plain, name)] += count
    return dict(sorted(found.items()))
