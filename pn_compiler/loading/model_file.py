"""load_model: pickled modules, state_dicts and checkpoints, exported programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pn_compiler.base.errors import LoadError, root_cause
from pn_compiler.loading.admission import admit, admit_nested, import_from_here, prepare_torchvision, refusal
from pn_compiler.loading.architectures import module_of
from pn_compiler.loading.archives import Archive, read_start
from pn_compiler.loading.inert_pickle import parse_pickle
from pn_compiler.loading.inert_types import extra_classes
from pn_compiler.loading.loaded import LoadedModel
from pn_compiler.loading.pickle_audit import ON_REQUEST, audit_pickle, names_in
from pn_compiler.loading.program_file import load_program
from pn_compiler.loading.rebuilding import Rebuild, is_saved
from pn_compiler.loading.safetensors_file import is_safetensors, read_safetensors


def load_model(
    path: Path,
    *,
    arch: str | None = None,
    allow: Sequence[str] = (),
    checkpoint_key: str | None = None,
    unsafe_pickle: bool = False,
    rebuild: Rebuild | None = None,
) -> LoadedModel:
    """Loads a pickled module, a state_dict or checkpoint, or an exported program.

    Args:
        path: the file.
        arch: ``package.module:factory`` that builds the module for a state_dict. It is imported.
        allow: ``package.module.Class`` names that a pickle may use, besides those of torch.nn,
            torchvision and timm. Their packages are imported.
        checkpoint_key: the entry of a checkpoint that holds the weights; dots lead into nested dictionaries,
            and to a prefix of names. Default: see `find_weights`.
        unsafe_pickle: let the file run any code, as ``torch.load(weights_only=False)`` does.
        rebuild: builds converted networks, from what `pn_compiler.save` wrote or from their weights.

    Raises:
        LoadError: the file is missing, damaged, of another kind, or names something that is not allowed.
    """
    if is_safetensors(read_start(path)):
        what = "looks like safetensors"
        return module_of(path, read_safetensors(path), arch, checkpoint_key, what, rebuild=rebuild)
    archive = Archive.open(path)
    names = archive.sizes
    if any(name.startswith("models/") for name in names):
        return load_program(archive, unsafe=unsafe_pickle)
    if "data.pkl" not in names:
        raise LoadError(f"{path} is a zip archive but not a model saved by torch.save or torch.export")
    loaded = _unpickle(archive, allow, unsafe=unsafe_pickle)
    if is_saved(loaded):
        if arch is not None:
            raise LoadError(f"{path} holds a whole network: leave out --arch")
        return _rebuilt(path, loaded, rebuild)
    return module_of(path, loaded, arch, checkpoint_key, rebuild=rebuild)


def _rebuilt(path: Path, loaded: Mapping[str, Any], rebuild: Rebuild | None) -> LoadedModel:
    if rebuild is None:
        raise LoadError(f"{path} holds a converted network: pn_compiler.load reads it")
    try:
        model, inputs = rebuild.network(loaded)
    except LoadError as error:
        raise LoadError(f"{path} {error}") from error
    return LoadedModel(model, inputs)


def names_to_allow(path: Path) -> list[str]:
    """The names of the classes in the pickle at `path` that are not known, and that `allow` could admit."""
    parsed = parse_pickle(Archive.open(path).read("data.pkl"))
    return [name for name in names_in(parsed) if admit(name, ()) is None]


def _unpickle(archive: Archive, allow: Sequence[str], *, unsafe: bool) -> Any:
    if unsafe:
        import_from_here()
        prepare_torchvision()
        return _torch_load(archive.path, weights_only=False)
    try:
        parsed = parse_pickle(archive.read("data.pkl"))
    except LoadError as error:
        raise LoadError(f"{archive.path} is damaged: {error}") from error
    admitted = {name: admit(name, allow) for name in names_in(parsed)}
    if refused := [name for name, cls in admitted.items() if cls is None]:
        raise LoadError(f"{archive.path} {refusal(refused)}")
    audit_pickle(archive, admitted.get)
    named: Mapping[str, Any] = ON_REQUEST | admit_nested(parsed.nested, admitted) | admitted
    known = [(value, name) for name, value in named.items()]
    with torch.serialization.safe_globals([*known, *(extra_classes() if "numpy.dtype" in named else ())]):
        return _torch_load(archive.path, weights_only=True)


def _torch_load(path: Path, *, weights_only: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # a damaged file, or its own code, can raise anything
        raise LoadError(f"cannot load {path}: torch.load fails on it ({root_cause(error)[:200]})") from error
