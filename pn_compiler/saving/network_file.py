"""The public functions save and load, and what the command loads converted networks by."""

import io
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pn_compiler.base.errors import (
    ConfigError,
    ExportError,
    LoadError,
    PnCompilerError,
    UnsupportedModelError,
    first_line,
)
from pn_compiler.base.files import check_writable, staged_file
from pn_compiler.base.input_specs import InputSpec
from pn_compiler.base.option_checks import check_path
from pn_compiler.data.input_shape import described_inputs
from pn_compiler.graph.graph_module import ConvertedModule, is_converted, provenance
from pn_compiler.graph.provenance import Provenance
from pn_compiler.inspection.hooks import has_hooks
from pn_compiler.loading.model_file import load_model, names_to_allow
from pn_compiler.running.copying import unwrap
from pn_compiler.running.evaluation import check_values
from pn_compiler.running.inputs import Inputs
from pn_compiler.saving.contents import Contents, built, contents_of
from pn_compiler.saving.edits import difference

_MOST = 2**28  # elements of an input


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a converted network to a file that holds no code: `load` and ``pn-compile`` read it.

    The file has the architecture that was converted, the options of the conversion, the changes since, such
    as another head, and all values. It is written whole or not at all, and loaded once before it is kept.

    Args:
        model: a result of `transform`, as it is, fine-tuned, edited, or wrapped by torch.compile or
            DistributedDataParallel.
        path: of the file, by custom ``.pt``.

    Raises:
        ConfigError: `model` is not a converted network, or has no values.
        UnsupportedModelError: no file can hold it (PN304): it was folded, has hooks, or holds modules of
            classes that cannot be imported.
        ExportError: the file cannot be written.
    """
    check_path("path", path)
    target = Path(path)
    check_writable(target)
    model = unwrap(model)
    if not is_converted(model):
        raise ConfigError(f"{type(model).__name__} is not a result of pn_compiler.transform")
    check_values(model)
    try:
        contents = contents_of(model, _origin(model))
        plain = contents.to_plain()
    except (PnCompilerError, ValueError) as error:
        raise _refusal(error) from error
    with staged_file(target) as staged:
        _write(plain, staged, target)
        try:
            changed = difference(_loaded(staged, names_to_allow(staged)), model)
        except PnCompilerError as error:
            raise _refusal(error, staged) from error
        if changed:
            raise _refusal(f"{changed} is not what a conversion of its architecture gives")


def load(path: str | os.PathLike[str], *, allow: Sequence[str] = ()) -> nn.Module:
    """Reads a converted network that `save` wrote. No code of the file runs.

    Args:
        path: of the file.
        allow: ``package.module.Class`` names of classes that it may use, besides those of torch.nn,
            torchvision and timm. Their packages are imported.

    Returns:
        The network on the CPU, as `transform` has returned it, with the changes since and in its modes.

    Raises:
        LoadError: the file is missing, damaged, of another kind, or names a class that is not allowed.
    """
    check_path("path", path)
    return _loaded(Path(path), allow)


def _loaded(path: Path, allow: Sequence[str]) -> nn.Module:
    model = load_model(path, allow=allow, rebuild=SavedNetworks()).model
    if not is_converted(model):
        raise LoadError(f"{path} holds no network of pn_compiler.save, but a {type(model).__name__}")
    return model


class SavedNetworks:
    """Reads what `save` wrote."""

    def network(self, saved: Mapping[str, Any]) -> tuple[nn.Module, Inputs | None]:
        """The network, and random inputs like those that it was traced with, if they are tensors."""
        try:
            contents = Contents.from_plain(saved)
            model = built(contents)
        except PnCompilerError as error:
            raise LoadError(str(error)) from error
        except Exception as error:  # values of any type may be where others belong
            raise LoadError(f"holds what makes no network: {first_line(error)}") from error
        return model, _like(contents.origin.inputs, model)

    def architecture(self, model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        raise LoadError("holds weights of a converted network: pn_compiler.load reads files of save")


def _like(inputs: Inputs | None, model: nn.Module) -> Inputs | None:
    """Random inputs of the shapes of `inputs`; None if these are too large, or not only tensors."""
    given = [] if inputs is None else [*(("", x) for x in inputs.args), *inputs.kwargs.items()]
    if not given or not all(isinstance(x, Tensor) and 0 < x.numel() < _MOST for _, x in given):
        return None
    specs = [InputSpec((*x.shape,), name, str(x.dtype).removeprefix("torch.")) for name, x in given]
    try:
        return described_inputs(model, specs)
    except Exception:  # such as a dtype that has no random values: the user will be asked
        return None


def _origin(model: nn.Module) -> Provenance:
    """How `model` was converted. Raises UnsupportedModelError if no file can hold it."""
    origin = provenance(model)
    if origin is None:
        raise UnsupportedModelError(
            "it was folded or frozen, or converted by an earlier version: save it before that, and fold "
            "what is loaded"
        )
    if origin.structure is None:
        raise UnsupportedModelError(
            "its architecture is not known, for it came as a graph or cannot be copied or pickled: keep its "
            "state_dict, and convert the architecture again to load that"
        )
    for path, module in model.named_modules():
        if has_hooks(module):
            raise UnsupportedModelError(
                f"{path or 'it'} has hooks, which are code: remove them, and register them after loading"
            )
    if isinstance(model, ConvertedModule):
        model.graph.lint()  # makes the graph fit what was changed
    return origin


def _write(plain: dict[str, Any], staged: Path, target: Path) -> None:
    """Raises ExportError if there is no space, UnsupportedModelError if something cannot be pickled."""
    try:
        _Probe(io.BytesIO(), 2).dump(plain)
    except Exception as error:  # of pickle, or of a class
        raise _refusal(error) from error
    try:
        torch.save(plain, staged)
    except Exception as error:  # torch does not raise an OSError
        raise ExportError(
            f"cannot write {target}: torch.save fails, as on a full disk ({first_line(error)[:200]})"
        ) from error


class _Probe(pickle.Pickler):
    """Pickles all but the values of tensors, as torch.save does."""

    def persistent_id(self, value: Any) -> Any:
        return "tensor" if isinstance(value, Tensor) else None


def _refusal(error: object, staged: Path | None = None) -> UnsupportedModelError:
    text = first_line(error) if isinstance(error, Exception) else str(error)
    if staged is not None:
        text = text.replace(f"{staged} ", "it ").replace(str(staged), "the file")
    return UnsupportedModelError(f"PN304 the network cannot be saved: {text}")
