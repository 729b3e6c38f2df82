"""From what a file holds to a module: as it is, or weights in a network that the user names."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.base.errors import LoadError, first_line
from pn_compiler.loading.admission import import_from_here, resolve
from pn_compiler.loading.checkpoints import Weights, find_weights, weights_at, without_weights
from pn_compiler.loading.loaded import LoadedModel
from pn_compiler.loading.rebuilding import Rebuild, is_converted_state
from pn_compiler.loading.weight_names import Renamed, is_averaged, rename_weights

_LISTED = 5


def module_of(
    path: Path,
    loaded: Any,
    arch: str | None,
    key: str | None,
    what: str = "holds a state_dict",
    *,
    rebuild: Rebuild | None = None,
) -> LoadedModel:
    """The module that a file holds, or that `arch` makes for its weights.

    Args:
        path: of the file, for messages.
        loaded: what it holds.
        arch: ``package.module:factory``.
        key: the entry that holds the weights; the best one if None.
        what: is to be said of a file without a module.
        rebuild: converts the module where the weights are those of a converted one.

    Raises:
        LoadError: there are no weights, or they do not fit.
    """
    found, prefix = _weights(path, loaded, key)
    modules = [weights for weights in found if isinstance(weights.values, nn.Module)]
    if modules and arch is None:
        first = modules[0]
        assert isinstance(first.values, nn.Module)
        _check_whole(path, first.values)
        return LoadedModel(first.values, notes=_taken(first, found))
    if isinstance(loaded, nn.Module):
        raise LoadError(f"{path} holds a whole module: leave out --arch")
    if arch is None:
        raise LoadError(
            f"{path} {what}, parameters without the network: name the function that makes "
            "it, for example --arch torchvision.models:resnet18 or --arch timm.models:resnet18"
        )
    model = _make(arch)
    converted = rebuild is not None and is_converted_state(_state(found[0]), model.state_dict())
    if rebuild is not None and converted:
        try:
            model = rebuild.architecture(model, _state(found[0]))
        except LoadError as error:
            raise LoadError(f"{path} {error}") from error
    filled = _fill(path, found, prefix, model, arch)
    if not converted:
        return filled
    message = f"they are the weights of a converted network: {arch} was converted before they were loaded"
    return dataclasses.replace(filled, notes=(*filled.notes, Diagnostic("PN305", "", message)))


def state_for(loaded: Any, expected: Iterable[str], key: str | None = None) -> dict[str, Any] | None:
    """The weights in a checkpoint under the names of a network; None if none has all `expected` names.

    Raises:
        LoadError: there are no weights, or several that fit.
    """
    if key is None:
        found, prefix = find_weights(loaded), None
    else:
        weights, prefix = weights_at(loaded, key)
        found = [weights]
    if not found:
        raise LoadError(f"it {without_weights(loaded)}")
    fits = ((weights, rename_weights(_state(weights), expected, prefix)) for weights in found)
    return next((renamed.state for _, renamed in fits if renamed is not None), None)


def _weights(path: Path, loaded: Any, key: str | None) -> tuple[list[Weights], str | None]:
    """(weights in a file, the best first; the prefix of their names that the user asks for)."""
    if key is not None:
        try:
            weights, prefix = weights_at(loaded, key)
        except LoadError as error:
            raise LoadError(f"{path} {error}") from error
        return [weights], prefix or None
    found = find_weights(loaded)
    if not found:
        raise LoadError(f"{path} {without_weights(loaded)}")
    return found, None


def _state(weights: Weights) -> Mapping[Any, Any]:
    values = weights.values
    return values.state_dict() if isinstance(values, nn.Module) else values


def _taken(taken: Weights, found: list[Weights], renamed: Renamed | None = None) -> tuple[Diagnostic, ...]:
    """Says which weights of a checkpoint were taken, and what was left there."""
    prefix = renamed.prefix if renamed is not None else ""
    key = ".".join(filter(None, (taken.key, prefix.removesuffix("."))))
    others = [weights.key for weights in found if weights is not taken]
    others += [
        ".".join(filter(None, (taken.key, p.removesuffix(".")))) for p in (renamed.others if renamed else ())
    ]
    notes = []
    if key:
        average = ", an average over the training" if is_averaged(key) else ""
        also = f"; there are others under {', '.join(others[:_LISTED])}" if others else ""
        hint = "--checkpoint-key takes another entry" if others else ""
        notes.append(Diagnostic("PN301", "", f"the weights under {key} were taken{average}{also}", hint))
    left = renamed.left if renamed is not None else ()
    if left:
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        message = f"entries that are not of this network: {', '.join(left[:_LISTED])}{more}"
        notes.append(Diagnostic("PN302", "", message))
    return tuple(notes)


def _fill(path: Path, found: list[Weights], prefix: str | None, model: nn.Module, arch: str) -> LoadedModel:
    """`model` with the first of the weights that fit."""
    expected = model.state_dict().keys()
    taken, renamed = found[0], None
    for weights in found:
        state = _state(weights)
        if not all(isinstance(name, str) for name in state):
            raise LoadError(f"{path} holds tensors under keys that are no names: it is not a state_dict")
        try:
            renamed = rename_weights(state, expected, prefix)
        except LoadError as error:
            raise LoadError(f"{path} {error}") from error
        if renamed is not None:
            taken = weights
            break
    given = _state(taken) if renamed is None else renamed.state
    _check_kinds(path, given, model, arch)
    try:
        model.load_state_dict(given)
    except Exception as error:  # such as a shape that differs
        lines = [line.strip() for line in str(error).splitlines()]
        pointed = next((line for line in lines if "convert_state_dict" in line), None)
        detail = pointed or " ".join(str(error).split())
        raise LoadError(f"{path} does not fit {arch}: {detail[:400]}") from error
    return LoadedModel(model, notes=_taken(taken, found, renamed))


def _check_whole(path: Path, model: nn.Module) -> None:
    """Raises LoadError if a module lacks an option that its class declares, such as a stride."""
    for name, module in model.named_modules():
        for option in getattr(type(module), "__constants__", ()):
            if not hasattr(module, option):
                place = name or "the module"
                raise LoadError(
                    f"{path} is damaged: {place} has no {option}, which a {type(module).__name__} has"
                )


def _check_kinds(path: Path, state: Mapping[str, Any], model: nn.Module, arch: str) -> None:
    """Raises LoadError if loading would convert numbers to another kind, rounding or truncating them."""
    for key, value in model.state_dict().items():
        given = state.get(key)
        if (
            isinstance(given, torch.Tensor)
            and isinstance(value, torch.Tensor)
            and _kind(given) != _kind(value)
        ):
            dtypes = (str(tensor.dtype).removeprefix("torch.") for tensor in (given, value))
            raise LoadError("{} does not fit {}: {} holds {}, not {}".format(path, arch, key, *dtypes))


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else "integer"


def _make(arch: str) -> nn.Module:
    module_name, colon, factory_name = arch.partition(":")
    if not (module_name and colon and factory_name):
        meant = f", such as {':'.join(arch.rsplit('.', 1))}" if "." in arch else ""
        raise LoadError(f"--arch {arch}: expected package.module:factory{meant}")
    import_from_here()
    factory: Callable[[], Any] = resolve(f"{module_name}.{factory_name}")
    try:
        model = factory()
    except Exception as error:
        raise LoadError(f"--arch {arch} failed: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"--arch {arch} made a {type(model).__name__}, not an nn.Module")
    return model
