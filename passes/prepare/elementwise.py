"""What an elementwise expression computes of one value, on the whole real line.

Clamps, comparisons, products and sums are composed exactly. Of the rest it is known where it may bend.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, fx, nn

from pn_compiler.graph.aliases import writes
from pn_compiler.graph.graph_utils import called_module
from pn_compiler.inspection.fake_tensors import has_values
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.operators import piecewise
from pn_compiler.operators.activations import is_activation, kinks_of
from pn_compiler.operators.known_activations import piecewise_of
from pn_compiler.operators.op_names import operator_name
from pn_compiler.operators.piecewise import NotPiecewiseError, Piecewise


@dataclass(frozen=True)
class Smooth:
    """A function that is no piecewise polynomial, and analytic but at `edges`."""

    edges: frozenset[Fraction]


Value = Piecewise | Smooth
Evaluate = Callable[..., Value]


def value_of(gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Value]) -> Value | None:
    """What `node` computes of the value that `values` are functions of; None if that is not known.

    Args:
        values: of the nodes that it reads; one that is overwritten stays what it was, so must not be read
            again, or there is no answer.
    """
    if not _is_read_before(gm, node):
        return None
    module = called_module(gm, node)
    try:
        if module is not None:
            return _of_module(module, values[node.all_input_nodes[0]])
        evaluate = _OPERATORS.get(spelled(node))
        if evaluate is None:
            return None
        args, kwargs = _arguments(node, values)
        inspect.signature(evaluate).bind(*args, **kwargs)
        return evaluate(*args, **kwargs)
    except (NotPiecewiseError, KeyError, TypeError, OverflowError):
        return None


def _arguments(node: fx.Node, values: dict[fx.Node, Value]) -> tuple[list[Any], dict[str, Any]]:
    """Positional ones, the input among them, and keywords."""
    args = [values[a] if isinstance(a, fx.Node) else a for a in node.args]
    kwargs = {k: values[a] if isinstance(a, fx.Node) else a for k, a in node.kwargs.items()}
    if "input" in kwargs:
        args.insert(0, kwargs.pop("input"))
    if operator_name(node) == "where" and node.op == "call_method":
        args[:2] = args[1::-1]
    return args, kwargs


def spelled(node: fx.Node) -> str:
    """Name of the operator, in place or not."""
    name = operator_name(node)
    return name if name in _OPERATORS else name.removesuffix("_").removeprefix("i")


def constant_of(gm: fx.GraphModule, node: fx.Node) -> Piecewise | None:
    """The number that `node` reads if tracing has taken it from the forward, such as torch.tensor(0.)."""
    target = str(node.target)
    if node.op != "get_attr" or not target.startswith("_tensor_constant"):
        return None
    constant = getattr(gm, target, None)
    if (
        not isinstance(constant, Tensor)
        or constant.dim()
        or constant.requires_grad
        or not has_values(constant)
    ):
        return None
    return piecewise.constant(float(constant)) if math.isfinite(constant) else None


def _is_read_before(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether nothing reads what `node` overwrites, if it does, later on."""
    return all(user <= node for target in writes(gm, node) for user in target.users)


def _of_module(module: nn.Module, x: Value) -> Value | None:
    if not is_activation(module) or has_hooks(module) or next(module.parameters(), None) is not None:
        return None
    function = piecewise_of(module)
    if function is not None:
        return piecewise.compose(function, _known(x))
    kinks = [piecewise.constant(kink) for kink in kinks_of(module)]
    return _smooth(x, *(piecewise.compare(_known(x), kink, bool) for kink in kinks))


def _known(x: Any) -> Piecewise:
    """`x` itself: where another function bends cannot be told for what is made of it."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return piecewise.constant(x)
    if not isinstance(x, Piecewise):
        raise NotPiecewiseError
    return x


def _any(x: Any) -> Value:
    return x if isinstance(x, Smooth) else _known(x)


def _smooth(*values: Any) -> Smooth:
    return Smooth(frozenset(itertools.chain.from_iterable(_any(x).edges for x in values)))


def _combine(function: Callable[..., Piecewise], *values: Any) -> Value:
    """`function` of what is piecewise polynomial, if it stays so."""
    operands = [_any(x) for x in values]
    if all(isinstance(x, Piecewise) for x in operands):
        try:
            return function(*operands)
        except NotPiecewiseError:
            pass
    return _smooth(*operands)


def _add(x: Any, other: Any, *, alpha: float = 1) -> Value:
    operands = [_any(x), _any(other)]
    if all(isinstance(x, Piecewise) and x.boolean for x in operands):
        raise NotPiecewiseError  # a disjunction
    return _combine(lambda f, g: piecewise.add(f, g, alpha), *operands)


def _sub(x: Any, other: Any, *, alpha: float = 1) -> Value:
    return _add(x, other, alpha=-alpha)


def _rsub(x: Any, other: Any, *, alpha: float = 1) -> Value:
    return _add(other, x, alpha=-alpha)


def _mul(x: Any, other: Any) -> Value:
    return _combine(piecewise.multiply, x, other)


def _div(x: Any, other: Any) -> Value:
    return _combine(piecewise.divide, x, other)


def _neg(x: Any) -> Value:
    return _mul(-1, x)


def _pow(x: Any, exponent: Any) -> Value:
    if exponent == 1:
        return _any(x)
    if exponent == 2:
        return _mul(x, x)
    if (isinstance(exponent, int) and exponent > 0) or not isinstance(x, Value):
        return _smooth(x, exponent)
    raise NotPiecewiseError  # roots and poles


def _clamp(x: Any, min: Any = None, max: Any = None) -> Value:  # noqa: A002  # torch's names
    result: Value = _known(x)
    if min is not None and min != -math.inf:
        result = piecewise.maximum(_known(result), _known(min))
    if max is not None and max != math.inf:
        result = piecewise.minimum(_known(result), _known(max))
    return result


def _larger(x: Any, other: Any) -> Value:
    return piecewise.maximum(_tensor(x), _tensor(other))


def _smaller(x: Any, other: Any) -> Value:
    return piecewise.minimum(_tensor(x), _tensor(other))


def _tensor(x: Any) -> Piecewise:
    """`x`, which must not be a number: max(x, 1) is a reduction."""
    return _known(x if isinstance(x, Piecewise) else None)


def _abs(x: Any) -> Value:
    return piecewise.maximum(_known(x), piecewise.multiply(piecewise.constant(-1), _known(x)))


def _where(condition: Any, x: Any, other: Any) -> Value:
    decides = _known(condition)
    if isinstance(x, Smooth) or isinstance(other, Smooth):
        return _smooth(decides, x, other)
    return piecewise.choose(decides, _known(x), _known(other))


def _masked_fill(x: Any, mask: Any, value: Any) -> Value:
    return _where(mask, value, x)


def _comparison(holds: Callable[[int], bool]) -> Evaluate:
    def evaluate(x: Any, other: Any) -> Value:
        return piecewise.compare(_known(x), _known(other), holds)

    return evaluate


def _both(x: Any, other: Any) -> Value:
    if not all(isinstance(x, Piecewise) and x.boolean for x in (x, other)):
        raise NotPiecewiseError  # bits
    return piecewise.multiply(x, other)


def _either(x: Any, other: Any) -> Value:
    return _not(_both(_not(x), _not(other)))


def _not(x: Any) -> Piecewise:
    if not isinstance(x, Piecewise) or not x.boolean:
        raise NotPiecewiseError
    return piecewise.compare(x, piecewise.constant(0), lambda sign: sign == 0)


def _as_number(x: Any) -> Value:
    if not isinstance(x, Piecewise) or not x.boolean:
        raise NotPiecewiseError  # another dtype
    return piecewise.add(x, piecewise.constant(0))


def _fill(number: float) -> Evaluate:
    return lambda x, **options: piecewise.constant(number)


_SIGNS: dict[str, Callable[[int], bool]] = {
    "gt": lambda sign: sign > 0,
    "ge": lambda sign: sign >= 0,
    "lt": lambda sign: sign < 0,
    "le": lambda sign: sign <= 0,
    "eq": lambda sign: sign == 0,
    "ne": lambda sign: sign != 0,
}
_SMOOTH = (
    "cos", "erf", "exp", "exp2", "expm1", "log", "log1p", "log2", "reciprocal", "rsqrt", "sigmoid", "sin",
    "sqrt", "tanh",
)  # fmt: skip
_OPERATORS: dict[str, Evaluate] = {
    "add": _add,
    **dict.fromkeys(("sub", "subtract"), _sub),
    "rsub": _rsub,
    **dict.fromkeys(("mul", "multiply"), _mul),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), _div),
    **dict.fromkeys(("neg", "negative"), _neg),
    "pow": _pow,
    "square": lambda x: _mul(x, x),
    **dict.fromkeys(("abs", "absolute"), _abs),
    **dict.fromkeys(("clamp", "clip"), _clamp),
    "clamp_min": lambda x, min: _clamp(x, min=min),  # noqa: A006  # torch's names
    "clamp_max": lambda x, max: _clamp(x, max=max),  # noqa: A006
    **dict.fromkeys(("max", "maximum"), _larger),
    **dict.fromkeys(("min", "minimum"), _smaller),
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(("and_", "logical_and"), _both),
    **dict.fromkeys(("or_", "logical_or"), _either),
    **dict.fromkeys(("invert", "logical_not"), _not),
    "float": _as_number,
    "type_as": lambda x, other: _as_number(x),
    "zeros_like": _fill(0.0),
    "ones_like": _fill(1.0),
    "full_like": lambda x, fill_value, **options: _known(fill_value),
    **{name: _comparison(holds) for name, holds in _SIGNS.items()},
    **dict.fromkeys(_SMOOTH, _smooth),
}
