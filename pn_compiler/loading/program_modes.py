"""Exported programs as they would be, had they been exported in eval mode."""

from typing import TYPE_CHECKING

import torch
from torch import fx

from pn_compiler.base.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Callable

_ATEN = torch.ops.aten
#: Operator -> place and name of the argument that says whether it trains.
_FLAGS = {
    _ATEN.dropout.default: (2, "train"), _ATEN.feature_dropout.default: (2, "train"),
    _ATEN.alpha_dropout.default: (2, "train"), _ATEN.feature_alpha_dropout.default: (2, "train"),
    _ATEN.rrelu.default: (3, "training"), _ATEN.batch_norm.default: (5, "training"),
    _ATEN.lstm.input: (6, "train"), _ATEN.gru.input: (6, "train"), _ATEN.rnn_tanh.input: (6, "train"),
    _ATEN.rnn_relu.input: (6, "train"),
}  # fmt: skip
_STATISTICS = 3  # the argument of a batch_norm that holds its running mean; without it there is no eval mode
_ATTENTION = _ATEN.scaled_dot_product_attention.default
_DROPOUT_P = 4
_LEGIT = (_ATEN._native_batch_norm_legit.default, _ATEN._native_batch_norm_legit_functional.default)
_COUNTER = "num_batches_tracked"
_WRITES = (_ATEN.add_.Tensor, _ATEN.copy_.default)


def to_eval_mode(gm: fx.GraphModule) -> list[str]:
    """Makes `gm`, the module of a program, compute what it would in eval mode; eps and momentum stay.

    Returns:
        The operators that were in train mode, by name; empty if the program was exported in eval mode.

    Raises:
        LoadError: it draws random numbers in other ways, so that what it does in eval mode is unknown.
    """
    changed = [node.name for node in list(gm.graph.nodes) if _switch(node)]
    if not changed:
        return []
    _drop_updates(gm.graph)
    random = [node for node in gm.graph.nodes if _draws(node)]
    if random:
        raise LoadError(
            f"was exported in train mode ({changed[0]}) and draws random numbers ({random[0].name}): call "
            "model.eval() before torch.export.export"
        )
    gm.graph.lint()
    gm.recompile()
    return changed


def _draws(node: fx.Node) -> bool:
    """Whether it draws random numbers, also in eval mode."""
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op == "call_function" and random and node.target not in {*_FLAGS, _ATTENTION}


def _switch(node: fx.Node) -> bool:
    """Puts one operator into eval mode. Returns whether it was not."""
    if node.op != "call_function":
        return False
    if node.target in _FLAGS:
        return _switch_flag(node)
    switches: dict[object, Callable[[fx.Node], bool]] = {
        _ATTENTION: _switch_attention,
        _ATEN.native_dropout.default: _switch_native_dropout,
        **dict.fromkeys(_LEGIT, _switch_legit),
    }
    return node.target in switches and switches[node.target](node)


def _switch_flag(node: fx.Node) -> bool:
    place, name = _FLAGS[node.target]  # type: ignore[index]  # a function is looked up
    without = node.target == _ATEN.batch_norm.default and node.args[_STATISTICS] is None
    given = node.args[place] if len(node.args) > place else node.kwargs.get(name)
    if given is not True or without:
        return False
    if len(node.args) > place:
        node.update_arg(place, False)
    else:
        node.update_kwarg(name, False)
    return True


def _switch_attention(node: fx.Node) -> bool:
    given = node.args[_DROPOUT_P] if len(node.args) > _DROPOUT_P else node.kwargs.get("dropout_p")
    if not given:
        return False
    if len(node.args) > _DROPOUT_P:
        node.update_arg(_DROPOUT_P, 0.0)
    else:
        node.update_kwarg("dropout_p", 0.0)
    return True


def _switch_native_dropout(node: fx.Node) -> bool:
    """Its first result, of two, is its input in eval mode."""
    if node.args[2] is not True:
        return False
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # a tensor
            user.graph.erase_node(user)
    if not node.users:
        node.graph.erase_node(node)
    return True


def _switch_legit(node: fx.Node) -> bool:
    """What a batch_norm is decomposed to, whose further results are the new running statistics."""
    x, weight, bias, mean, var, training, momentum, eps = node.args
    if training is not True or mean is None:
        return False
    node.target = _ATEN._native_batch_norm_legit_no_training.default
    node.args = (x, weight, bias, mean, var, momentum, eps)
    return True


def _drop_updates(graph: fx.Graph) -> None:
    """Removes what only updates running statistics and counters of batches."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in _WRITES and not node.users:
            written = node.args[0]
            if (
                isinstance(written, fx.Node)
                and written.op == "get_attr"
                and _is_statistic(str(written.target))
            ):
                graph.erase_node(node)
    graph.eliminate_dead_code()


def _is_statistic(path: str) -> bool:
    return path.rpartition(".")[2] in ("running_mean", "running_var", _COUNTER)
