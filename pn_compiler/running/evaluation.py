"""Running a model on batches of samples, and leaving it as it was."""

import abc
import contextlib
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pn_compiler.base.errors import ConfigError, PnCompilerError, first_line
from pn_compiler.base.progress import track
from pn_compiler.inspection.captured import attributes, reachable
from pn_compiler.inspection.fake_tensors import has_values
from pn_compiler.inspection.module_state import ModuleState, WrittenParameters
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.random_states import RandomStates

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class Shards(abc.ABC):
    """Batches stored in several places, such as the machines of a cluster: see `integrations.ray`."""

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """Iterates over all batches in this process."""

    @abc.abstractmethod
    def each(self, function: Callable[[Iterable[Any]], T]) -> list[T]:
        """Applies `function` to the batches of each shard, in the place where they are."""


def with_inputs(batch: Any, model: nn.Module) -> Any:
    """`batch` with its arguments as one Inputs, if the forward of `model` needs several and it holds them.

    With two, (x, y), (x, y, labels), ((x, y), labels) and the same as lists do.
    """
    count = _needed(model)
    if count < 2 or not isinstance(batch, tuple | list) or len(batch) < 2 or isinstance(batch[0], Inputs):
        return batch
    first = batch[0]
    if isinstance(first, tuple | list) and len(first) == count:
        return (Inputs(tuple(first)), *batch[1:])
    if len(batch) < count:
        return batch
    inputs = Inputs(tuple(batch[:count]))
    return (inputs, *batch[count:]) if len(batch) > count else inputs


def _needed(model: nn.Module) -> int:
    """How many arguments the forward of `model` cannot do without; 0 if that is not known."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 0
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in by_place and p.default is inspect.Parameter.empty for p in parameters)


def inputs_of(batch: Any, model: nn.Module | None = None) -> Inputs:
    """The arguments in a batch: those that `model` needs, of (images, labels) the first, all of a mapping by
    name, else the batch.
    """
    if model is not None:
        batch = with_inputs(batch, model)
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Inputs):
        batch = batch[0]
    if isinstance(batch, Inputs):
        return batch
    if isinstance(batch, Mapping):
        return Inputs((), dict(batch))
    return Inputs(tuple(batch[:1]) if isinstance(batch, tuple | list) else (batch,))


def labels_of(batch: Any, name: str) -> Any:
    """The labels in a batch: the second of (inputs, labels). Raises ConfigError if it has none."""
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return batch[1]
    raise ConfigError(f"{name} has no labels, which a metric needs: give batches (inputs, labels)")


def batches_of(batches: Any, *, again: bool = False) -> Iterable[Any]:
    """A user's `batches` as an iterable; a single tensor or mapping is one batch.

    Args:
        batches: an iterable of batches, such as a DataLoader or a list.
        again: whether it is iterated over more than once.

    Raises:
        ConfigError: it is not an iterable of batches; or `again` is set and it is a generator or another
            iterator that the first pass exhausts.
    """
    if isinstance(batches, Tensor | Mapping | Inputs):
        return [batches]
    readable = hasattr(type(batches), "__iter__") or hasattr(type(batches), "__getitem__")
    if isinstance(batches, str | bytes) or not readable:
        raise ConfigError(f"expected batches of inputs, such as a list or a DataLoader, got {batches!r:.80}")
    if again and iter(batches) is batches:
        raise ConfigError(
            f"the batches are a {type(batches).__name__}, which can be read once, and they are read several "
            "times: give a list, a DataLoader, or an object whose __iter__ starts again"
        )
    return batches  # type: ignore[no-any-return]


def each_batch(model: nn.Module, batches: Iterable[Any], title: str) -> Iterator[tuple[str, Inputs]]:
    """Name and arguments of each batch, on the device of `model`, under a progress bar.

    Raises:
        ConfigError: a batch holds values that are nan or infinite, or there is none.
    """
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    name = ""
    for number, batch in enumerate(track(batches, title), start=1):
        name, inputs = f"batch {number}", inputs_of(batch, model)
        check_dense(inputs, name)
        if not all(bool(x.isfinite().all()) for x in inputs.tensors()):
            raise ConfigError(f"{name} holds values that are nan or infinite")
        yield name, inputs if first is None else inputs.map(lambda x: x.to(first.device))
    if not name:
        raise ConfigError(f"there is no batch for the {title}: batches is empty")


def check_dense(inputs: Inputs, name: str) -> None:
    """Raises ConfigError if a tensor has no values or is not dense: meta, sparse, quantized."""
    for x in inputs.tensors():
        kind = "quantized" if x.is_quantized else str(x.layout).removeprefix("torch.")
        kind = kind if has_values(x) else "without values"
        if kind != "strided":
            raise ConfigError(f"{name} holds a tensor that is {kind}: give a dense one")


def check_values(model: nn.Module) -> list[Tensor]:
    """The tensors of `model`. Raises ConfigError if one has no values."""
    tensors = [*model.parameters(), *model.buffers()]
    if not all(map(has_values, tensors)):
        raise ConfigError(
            "the model has no values: its tensors are on the meta device, or fake; load its weights first"
        )
    return tensors


def run(model: nn.Module, inputs: Inputs, name: str) -> Any:
    """The outputs of `model`. Raises ConfigError with the `name` of the inputs if it does not run."""
    try:
        return inputs.call(model)
    except PnCompilerError:
        raise
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{list(x.shape)} {x.dtype}".replace("torch.", "") for x in inputs.tensors())
        raise ConfigError(f"the model does not run on {name} ({given}): {first_line(error)}") from error


def to_eval_mode(model: M) -> M:
    """Returns `model` with all its parts in eval mode, whatever else its own ``eval`` does or returns.

    Raises:
        ConfigError: its ``eval`` raises an exception.
    """
    if any(module.training for module in model.modules()):
        try:
            model.eval()
        except Exception as error:  # from a model that overrides eval or train
            raise ConfigError(f"{type(model).__name__}.eval() fails: {first_line(error)}") from error
        for module in model.modules():
            if module.training:
                module.training = False
    return model


def has_graph_for_each_mode(module: nn.Module) -> bool:
    """Whether train() and eval() of `module` swap its graph, as in torchvision's feature extractors."""
    overridden = type(module).train is not nn.Module.train
    return isinstance(module, fx.GraphModule) and overridden and "train" not in vars(module)  # torch.export's


@contextlib.contextmanager
def untouched(
    model: nn.Module,
    *,
    batch_statistics: bool = False,
    own_modes: bool = False,
    keep_state: bool = False,
) -> Iterator[None]:
    """Eager eval mode without gradients; the model and all random states are restored at the end.

    Args:
        model: any module that has values.
        batch_statistics: leave its BatchNorms in train mode.
        own_modes: leave every module in its current mode.
        keep_state: also undo what the forward itself writes to parameters and global variables.

    Raises:
        ConfigError: its tensors are on the meta device, or fake.
    """
    tensors = check_values(model)
    modes = [(module, module.training) for module in model.modules()]
    switched = [m for m, training in modes if training and not own_modes and has_graph_for_each_mode(m)]
    randomness = RandomStates()
    for module, _ in modes:
        for value in reachable(attributes(module)):
            randomness.note(value)
    state, written = ModuleState(model, with_globals=keep_state), WrittenParameters(model)
    gpus = {tensor.get_device() for tensor in tensors if tensor.is_cuda}
    with (
        torch.random.fork_rng(gpus),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        written if keep_state else contextlib.nullcontext(),
    ):
        try:
            for gm in switched:
                gm.eval()
            for module, training in modes:  # not model.eval(), which some models override to do more
                norm_in_train_mode = batch_statistics and isinstance(module, _BatchNorm)
                module.training = training if own_modes else norm_in_train_mode
            yield
        finally:
            for gm in switched:
                gm.train()
            state.restore(traced=False)
            written.restore()
            randomness.restore()
            for module, training in modes:
                module.training = training


def seed_everything(seed: int = 0) -> None:
    """Seeds torch, Python and NumPy; call it within `untouched`, which restores their states."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # what models draw from
