"""Running a model on batches of samples, and leaving it as it was."""

import abc
import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from pn_compiler.base.errors import ConfigError, PnCompilerError, first_line
from pn_compiler.inspection.captured import attributes, reachable
from pn_compiler.inspection.fake_tensors import has_values
from pn_compiler.inspection.module_state import ModuleState, WrittenParameters
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.random_states import RandomStates

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class Shards(abc.ABC):
    """Batches that lie in several places, such as the machines of a cluster: see `integrations.ray`."""

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """All batches, here."""

    @abc.abstractmethod
    def each(self, function: Callable[[Iterable[Any]], T]) -> list[T]:
        """`function` of the batches of each shard, computed where they are."""


def of_each_shard(function: Callable[[Iterable[Any]], T], batches: Iterable[Any]) -> list[T]:
    """`function` of all batches, or, where these lie in several places, of those of each place."""
    return batches.each(function) if isinstance(batches, Shards) else [function(batches)]


def inputs_of(batch: Any) -> Inputs:
    """The arguments in a batch: of (images, labels) the first, of a mapping all by name, else the one."""
    if isinstance(batch, Inputs):
        return batch
    if isinstance(batch, Mapping):
        return Inputs((), dict(batch))
    return Inputs(tuple(batch[:1]) if isinstance(batch, tuple | list) else (batch,))


def batches_of(batches: Any, *, again: bool = False) -> Iterable[Any]:
    """What a user gave as batches; one tensor or mapping stands for one batch.

    Args:
        batches: an iterable of batches, such as a DataLoader or a list.
        again: whether it is gone through more than once.

    Raises:
        ConfigError: it holds no batches; or `again`, and it is a generator or another iterator that is
            used up by the first time.
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
    for number, batch in enumerate(tqdm(batches, desc=title, disable=None, leave=False), start=1):
        name, inputs = f"batch {number}", inputs_of(batch)
        check_dense(inputs, name)
        if not all(bool(x.isfinite().all()) for x in inputs.tensors()):
            raise ConfigError(f"{name} holds values that are nan or infinite")
        yield name, inputs if first is None else inputs.map(lambda x: x.to(first.device))
    if not name:
        raise ConfigError(f"there is no batch for the {title}: batches is empty")


def check_dense(inputs: Inputs, name: str) -> None:
    """Raises ConfigError if a tensor has no values, or not one for each place: meta, sparse, quantized."""
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
    """The outputs of `model`. Raises ConfigError, with the `name` of the inputs, if it does not run."""
    try:
        return inputs.call(model)
    except PnCompilerError:
        raise
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{list(x.shape)} {x.dtype}".replace("torch.", "") for x in inputs.tensors())
        raise ConfigError(f"the model does not run on {name} ({given}): {first_line(error)}") from error


def to_eval_mode(model: M) -> M:
    """`model`, in eval mode in all its parts, whatever its own ``eval`` does beside that, or returns.

    Raises:
        ConfigError: it raises an exception.
    """
    if any(module.training for module in model.modules()):
        try:
            model.eval()
        except Exception as error:  # of a model that overrides eval or train
            raise ConfigError(f"{type(model).__name__}.eval() fails: {first_line(error)}") from error
        for module in model.modules():
            if module.training:
                module.training = False
    return model


def has_graph_for_each_mode(module: nn.Module) -> bool:
    """Whether train() and eval() of `module` exchange its graph, as those of torchvision's extractors do."""
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
    """Eval mode, eager and without gradients; the model and all random numbers are as before at the end.

    Args:
        model: any module that has values.
        batch_statistics: leave its BatchNorms in train mode.
        own_modes: leave every module in the mode in which it is.
        keep_state: undo what the forward itself writes into parameters and global variables, too.

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
    """The same random numbers for torch, Python and NumPy; within `untouched`, which restores theirs."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # what models draw from
