"""The distance between the outputs of a student and those of its teacher."""

import dataclasses
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from pn_compiler.base.config import Logits as Logits  # read from here, too
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.option_checks import one_of

TEMPERATURE = 4.0
PIXEL_TEMPERATURE = 1.0


def output_loss(student: Any, teacher: Any, logits: Logits = "auto") -> Tensor:
    """The distillation loss, summed over all floating-point tensors of an output; other values are ignored.

    For the logits of K classes it is T^2 KL(softmax(t/T) || softmax(s/T)) in nats: at temperature T = 4 for
    those of samples [N, K], at T = 1 for those of pixels [N, K, *S], averaged over N and S. It is blind to a
    constant added to all K values of a sample or pixel. For every other tensor it is `relative_l2`.

    Args:
        student: outputs: tensors, and any nesting of tuples, lists, dicts and dataclasses.
        teacher: outputs of the same structure.
        logits: which outputs are treated as logits, as in `pn_compiler.distill`.

    Returns:
        A scalar, zero where the two are equal.

    Raises:
        ConfigError: the outputs differ in structure or shape, or hold no floating-point tensor.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531). A
    trained teacher is so sure of its training data that at T = 1 there is little to learn from. It is less
    sure of pixels: docs/distillation.md has the figures.
    """
    one_of("logits", logits, get_args(Logits))
    tensors = pairs(student, teacher)
    return torch.stack([_kl(s, t) if is_logits(t, logits) else _l2(s, t) for s, t in tensors]).sum()


def relative_l2(student: Any, teacher: Any) -> Tensor:
    """|s - t|^2 / |t|^2 over all values of a tensor, summed over the tensors as in `output_loss`.

    For outputs [N, K] that are not logits: regression, embeddings. If the teacher's output is zero
    everywhere, it is |s|^2.
    """
    return torch.stack([_l2(s, t) for s, t in pairs(student, teacher)]).sum()


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    temperature = TEMPERATURE if teacher.ndim == 2 else PIXEL_TEMPERATURE
    actual, expected = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    divergence = F.kl_div(actual, expected, reduction="sum", log_target=True)
    return temperature**2 * divergence / (teacher.numel() // teacher.shape[1])


def _l2(student: Tensor, teacher: Tensor) -> Tensor:
    power = teacher.square().sum()
    return (student - teacher).square().sum() / torch.where(power > 0, power, 1)


def is_logits(output: Tensor, logits: Logits = "auto") -> bool:
    """Whether `output` counts as logits: [N, K] with more than one class; with "all", [N, K, *S] too."""
    fits = output.ndim >= 2 and output.shape[1] > 1
    return fits and (logits == "all" or (logits == "auto" and output.ndim == 2))


def agreement(student: Any, teacher: Any, logits: Logits = "auto") -> float | None:
    """Share of samples, or pixels, for which both predict the same class; None without logits.

    With several outputs of logits it is their mean.
    """
    outputs = _logit_pairs(student, teacher, logits)
    return _mean([float((s.argmax(1) == t.argmax(1)).double().mean()) for s, t in outputs])


def divergence(student: Any, teacher: Any, logits: Logits = "auto") -> float | None:
    """KL(softmax(t) || softmax(s)) in nats, averaged over samples or pixels as in `agreement`."""
    outputs = [(widened(s), widened(t)) for s, t in _logit_pairs(student, teacher, logits)]
    return _mean([
        float(F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="sum", log_target=True))
        / (t.numel() // t.shape[1])
        for s, t in outputs
    ])  # fmt: skip


def distance(student: Any, teacher: Any, logits: Logits = "auto") -> float:
    """`divergence` of the logits, plus the relative L2 distance of each other floating-point output.

    Outputs that only one of the models has, or in another shape, do not count.
    """
    others = [_l2(widened(s), widened(t)) for s, t in _common(student, teacher) if not is_logits(t, logits)]
    return (divergence(student, teacher, logits) or 0.0) + float(sum(others))


def _logit_pairs(student: Any, teacher: Any, logits: Logits) -> list[tuple[Tensor, Tensor]]:
    """The outputs that hold logits, where both models have them in the same shape."""
    return [(s, t) for s, t in _common(student, teacher) if is_logits(t, logits) and t.numel()]


def _common(student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
    """The floating-point outputs that both models have in the same shape."""
    actual, expected = floating_outputs(student), floating_outputs(teacher)
    return [
        (actual[name], tensor)
        for name, tensor in expected.items()
        if name in actual and actual[name].shape == tensor.shape
    ]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def readings(outputs: Any, logits: Logits = "auto") -> dict[str, str]:
    """Place of each floating-point tensor -> what it is taken for, in words.

    Raises:
        ConfigError: all are said to hold logits, and none can.
    """
    tensors = floating_outputs(outputs)
    words = {}
    for name, tensor in tensors.items():
        classes = f"logits of {tensor.shape[1]} classes" if is_logits(tensor, "all") else ""
        words[name] = classes if is_logits(tensor, logits) else "values"
        if classes and logits == "auto" and words[name] == "values":
            words[name] += f"; if it holds {classes}, say so: logits='all', --distill-logits all"
    if logits == "all" and tensors and all(what == "values" for what in words.values()):
        shapes = ", ".join(f"{name} is {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ConfigError(f"logits='all', but no output has several classes along its dim 1: {shapes}")
    return words


def pairs(student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
    """The floating-point tensors of both, in at least float32. Raises like `output_loss`."""
    actual, expected = floating_outputs(student), floating_outputs(teacher)
    if not expected:
        raise ConfigError("the teacher's output holds no floating-point tensor: there is nothing to learn")
    if actual.keys() != expected.keys():
        raise ConfigError(
            f"the outputs do not fit: the model gives {', '.join(actual) or 'no floating-point tensor'}, the "
            f"teacher {', '.join(expected)}"
        )
    for name, tensor in expected.items():
        if actual[name].shape != tensor.shape:
            raise ConfigError(
                f"the outputs do not fit: {name} of the model is {list(actual[name].shape)}, that of the "
                f"teacher {list(tensor.shape)}"
            )
    return [(widened(actual[name]), widened(tensor)) for name, tensor in expected.items()]


def floating_outputs(outputs: Any) -> dict[str, Tensor]:
    """The floating-point tensors among `named_outputs`."""
    return {name: x for name, x in named_outputs(outputs).items() if x.is_floating_point()}


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _dense(tensor: Tensor) -> Tensor:
    """`tensor`, of any layout, as a dense one; complex values become pairs of numbers."""
    if tensor.is_quantized:
        return tensor.dequantize()
    dense = tensor if tensor.layout in (torch.strided, torch.jagged) else tensor.to_dense()
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense


def named_outputs(outputs: Any, name: str = "output") -> dict[str, Tensor]:
    """Place, such as ``output['boxes'][0]`` -> each tensor of an output."""
    results: dict[str, Tensor] = {}
    for path, leaf in pytree.tree_flatten_with_path(outputs)[0]:
        place = name + pytree.keystr(path)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                results |= named_outputs(getattr(leaf, field.name), f"{place}.{field.name}")
        elif isinstance(leaf, Tensor):
            results[place] = _dense(leaf)
    return results


def squared_norm(tensor: Tensor) -> float:
    """The sum of squares of all values, added in float64."""
    return float(tensor.detach().cpu().double().square().sum())
