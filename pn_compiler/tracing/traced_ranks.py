"""The number of dimensions or pieces of a value, at the current point of a trace.

``if x.dim() == 4:`` needs an answer while a forward is traced. The graph so far is run on fake tensors like
those of the example call, in order, so that in-place writes count. Nothing runs before the first question,
and each node runs once.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from pn_compiler.graph.aliases import writes
from pn_compiler.inspection.batch_norms import is_batch_norm, plain_base
from pn_compiler.inspection.captured import copy_with_functions
from pn_compiler.tracing.fixed_arguments import VARIES
from pn_compiler.tracing.super_calls import records_super_calls
from pn_compiler.tracing.training_flag import TrainingFlag

logger = logging.getLogger(__name__)

_Resize = Callable[[torch.Size], list[int]]


def _other_batch(shape: torch.Size) -> list[int]:
    return [2 if shape[0] == 1 else 1, *shape[1:]] if shape else []


def _larger(shape: torch.Size) -> list[int]:
    return [*shape[:2], *(2 * size for size in shape[2:])]


class TracedRanks:
    """Answers questions about the values of one trace.

    An answer must also hold for other batch sizes, and for larger images if the model accepts them: the
    number of dimensions of ``x.squeeze()`` depends on which sizes are 1.

    Args:
        root: the module that is traced.
        examples: returns the value of each placeholder in the example call, VARIES for an unknown one.
        pause: a context in which the trace ignores what runs.
    """

    def __init__(
        self,
        root: nn.Module,
        examples: Callable[[], Mapping[fx.Node, Any]],
        pause: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._root, self._examples, self._pause = root, examples, pause
        self._runs: list[_Run] | None = None
        self.answered = False  # whether any question was answered
        self.counted = False  # whether any answer was a number of pieces

    def of(self, node: fx.Node) -> int | None:
        """The number of dimensions of the tensor `node`; None if unknown or not a tensor."""
        return self._agreed(node, lambda value: value.dim() if isinstance(value, Tensor) else None)

    def of_items(self, node: fx.Node) -> int | None:
        """The number of sizes of a shape, or pieces of a split; None if unknown or `node` is neither."""
        count = self._agreed(node, lambda v: len(v) if isinstance(v, torch.Size) or _are_pieces(v) else None)
        self.counted = self.counted or (count is not None and _are_pieces(self._started()[0].value(node)))
        return count

    def _agreed(self, node: fx.Node, question: Callable[[Any], int | None]) -> int | None:
        with self._pause(), _no_log_of_torch():
            first, *others = [run.value(node) for run in self._started()]
        answers = {question(value) for value in (first, *others) if value is not VARIES}
        if first is VARIES or len(answers) != 1:
            return None
        (answer,) = answers
        self.answered = self.answered or answer is not None
        return answer

    def _started(self) -> "list[_Run]":
        if self._runs is None:
            examples = self._examples()
            resizings: tuple[_Resize, ...] = (list, _other_batch, _larger)
            self._runs = [_Run(self._root, examples, resize) for resize in resizings]
        return self._runs


class _Run:
    """Runs the nodes of the graph so far on fake tensors like those of an example."""

    def __init__(self, root: nn.Module, examples: Mapping[fx.Node, Any], resize: _Resize) -> None:
        self._root, self._examples, self._resize = root, examples, resize
        given = (*root.parameters(), *root.buffers(), *pytree.tree_leaves(list(examples.values())))
        fake = next((tensor for tensor in given if isinstance(tensor, FakeTensor)), None)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True) if fake is None else fake.fake_mode
        self._values: dict[fx.Node, Any] = {}  # VARIES for those that are unknown
        self._copies: dict[str, nn.Module] = {}
        self._last: fx.Node | None = None  # the last node that ran
        self._lost = False  # whether an unknown operation may have changed anything

    def value(self, node: fx.Node) -> Any:
        """The value of `node` after all nodes so far, or VARIES."""
        following = next(iter(node.graph.nodes)) if self._last is None else self._last.next
        while following.op != "root":
            self._values[following] = VARIES if self._lost else self._run(following)
            self._last = following
            following = following.next
        return VARIES if self._lost else self._values[node]

    def _run(self, node: fx.Node) -> Any:
        if any(self._values[source] is VARIES for source in node.all_input_nodes):
            self._lost = node.op != "call_module" and bool(writes(self._root, node))
            return VARIES
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._given)
        try:
            return self._execute(node, args, kwargs)
        except Exception:  # from user code on fake tensors, or from sizes that do not fit
            logger.debug("%s cannot run on fake tensors", node, exc_info=True)
            return VARIES

    def _given(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self._values[argument]
        return int(argument) != 0 if isinstance(argument, TrainingFlag) else argument

    def _execute(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if node.op == "placeholder":
            return pytree.tree_map_only(Tensor, self._fake_argument, self._examples.get(node, VARIES))
        if node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            value = getattr(self._root.get_submodule(owner), name)
            return self._fake(value) if isinstance(value, Tensor) else value
        if node.op == "call_module":
            target = self._copy_of(target)
        elif node.op == "call_method":
            target = functools.partial(_call_method, target)
        with self._mode, torch.no_grad():
            return target(*args, **kwargs)

    def _fake_argument(self, tensor: Tensor) -> Tensor:
        with self._mode:
            return self._fake(tensor.detach()).new_empty(self._resize(tensor.shape))

    def _fake(self, tensor: Tensor) -> Tensor:
        fake: Tensor = tensor if isinstance(tensor, FakeTensor) else self._mode.from_tensor(tensor)
        return fake

    def _copy_of(self, path: str) -> Callable[..., Any]:
        """A copy of the module at `path` for fake tensors; running it changes nothing in the model."""
        if path not in self._copies:
            module = self._root.get_submodule(path)
            held = [value for part in module.modules() for value in vars(part).values()]
            memo: dict[int, Any] = {id(t): self._fake(t.detach()) for t in held if isinstance(t, Tensor)}
            memo |= {id(t): self._fake(t) for t in (*module.parameters(), *module.buffers())}
            self._copies[path] = copy_with_functions(module, memo)
            for part in self._copies[path].modules():
                # no flag of the trace; and in train mode a BatchNorm may compute with the number of batches
                training = int(part.training) != 0 and not is_batch_norm(part)
                object.__setattr__(part, "training", training)
        copied = self._copies[path]
        if records_super_calls(copied):
            return functools.partial(plain_base(copied).forward, copied)
        return copied


@contextlib.contextmanager
def _no_log_of_torch() -> Iterator[None]:
    """Silences torch's log: fake tensors log each error before they raise it."""
    of_torch = logging.getLogger(torch._subclasses.fake_tensor.__name__)
    before, of_torch.disabled = of_torch.disabled, True
    try:
        yield
    finally:
        of_torch.disabled = before


def _are_pieces(value: Any) -> bool:
    """Whether `value` is a sequence as returned by split, chunk and unbind."""
    return isinstance(value, tuple | list) and all(isinstance(piece, Tensor) for piece in value)


def _call_method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)
