"""load_model: pickled modules, state_dicts and checkpoints, exported programs."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from pn_compiler.base.errors import LoadError, first_line, root_cause
from pn_compiler.loading.admission import admit, import_from_here, refusal, resolve
from pn_compiler.loading.archives import Archive
from pn_compiler.loading.pickle_audit import ON_REQUEST, audit_pickle, names_in
from pn_compiler.loading.program_audit import audit_program
from pn_compiler.running.inputs import Inputs

_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
_TRAINING_ARGUMENTS = {"aten.dropout.default": (2, "train"), "aten.batch_norm.default": (5, "training")}
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a model file holds.

    Attributes:
        model: the model, in the mode in which it was saved.
        inputs: the inputs that a program was exported with, or None.
        fixed_batch: the fixed batch size of an exported program, or None.
    """

    model: nn.Module
    inputs: Inputs | None = None
    fixed_batch: int | None = None


def load_model(
    path: Path, *, arch: str | None = None, allow: Sequence[str] = (), unsafe_pickle: bool = False
) -> LoadedModel:
    """Loads a pickled module, a state_dict or checkpoint, or an exported program.

    Args:
        path: the file.
        arch: ``package.module:factory`` that builds the module for a state_dict. It is imported.
        allow: ``package.module.Class`` names that a pickle may use, besides those of torch.nn,
            torchvision and timm. Their packages are imported.
        unsafe_pickle: let the file run any code, as ``torch.load(weights_only=False)`` does.

    Raises:
        LoadError: the file is missing, damaged, of another kind, or names something that is not allowed.
    """
    archive = Archive.open(path)
    names = archive.sizes
    if any(name.startswith("models/") for name in names):
        return _load_program(archive, unsafe=unsafe_pickle)
    if "data.pkl" not in names:
        raise LoadError(f"{path} is a zip archive but not a model saved by torch.save or torch.export")
    return LoadedModel(_as_module(path, _unpickle(archive, allow, unsafe=unsafe_pickle), arch))


# Pickles -------------------------------------------------------------------------------------------


def _unpickle(archive: Archive, allow: Sequence[str], *, unsafe: bool) -> Any:
    if unsafe:
        import_from_here()
        return _torch_load(archive.path, weights_only=False)
    try:
        names = names_in(archive.read("data.pkl"))
    except LoadError as error:
        raise LoadError(f"{archive.path} is damaged: {error}") from error
    admitted = {name: admit(name, allow) for name in names}
    if refused := [name for name, cls in admitted.items() if cls is None]:
        raise LoadError(f"{archive.path} {refusal(refused)}")
    audit_pickle(archive, admitted.get)
    with torch.serialization.safe_globals([(cls, name) for name, cls in (ON_REQUEST | admitted).items()]):
        return _torch_load(archive.path, weights_only=True)


def _torch_load(path: Path, *, weights_only: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # a damaged file, or its own code, can raise anything
        raise LoadError(f"cannot load {path}: torch.load fails on it ({root_cause(error)[:200]})") from error


def _as_module(path: Path, loaded: Any, arch: str | None) -> nn.Module:
    if isinstance(loaded, nn.Module):
        if arch is not None:
            raise LoadError(f"{path} holds a whole module: leave out --arch")
        _check_whole(path, loaded)
        return loaded
    state = _state_dict(loaded)
    if state is None:
        raise LoadError(f"{path} holds a {type(loaded).__name__}, neither a module nor a state_dict")
    if arch is None:
        raise LoadError(
            f"{path} holds a state_dict, parameters without the network: name the function that makes "
            "it, for example --arch torchvision.models:resnet18"
        )
    model = _make(arch)
    _check_kinds(path, state, model, arch)
    try:
        model.load_state_dict(state)
    except Exception as error:  # such as a shape that differs
        detail = " ".join(str(error).split())
        raise LoadError(f"{path} does not fit {arch}: {detail[:400]}") from error
    return model


def _check_whole(path: Path, model: nn.Module) -> None:
    """Raises LoadError if a module lacks an option that its class declares, such as a stride."""
    for name, module in model.named_modules():
        for option in getattr(type(module), "__constants__", ()):
            if not hasattr(module, option):
                place = name or "the module"
                raise LoadError(
                    f"{path} is damaged: {place} has no {option}, which a {type(module).__name__} has"
                )


def _check_kinds(path: Path, state: dict[str, Any], model: nn.Module, arch: str) -> None:
    """Raises LoadError if loading would convert numbers to another kind, rounding or truncating them."""
    if not all(isinstance(key, str) for key in state):
        raise LoadError(f"{path} holds tensors under keys that are no names: it is not a state_dict")
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


def _state_dict(loaded: Any) -> dict[str, Any] | None:
    """The state_dict that `loaded` is or holds, with the prefixes of wrappers removed."""
    if not isinstance(loaded, dict):
        return None
    if not loaded or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        candidates = (loaded[key] for key in _STATE_DICT_KEYS if isinstance(loaded.get(key), dict))
        nested = next(candidates, None)
        return None if nested is None else _state_dict(nested)
    state: dict[str, Any] = dict(loaded)
    for prefix in _WRAPPER_PREFIXES:
        if all(isinstance(key, str) and key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _make(arch: str) -> nn.Module:
    module_name, colon, factory_name = arch.partition(":")
    if not (module_name and colon and factory_name):
        raise LoadError(f"--arch {arch}: expected package.module:factory")
    import_from_here()
    factory: Callable[[], Any] = resolve(f"{module_name}.{factory_name}")
    try:
        model = factory()
    except Exception as error:
        raise LoadError(f"--arch {arch} failed: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"--arch {arch} made a {type(model).__name__}, not an nn.Module")
    return model


# Exported programs ---------------------------------------------------------------------------------


def _load_program(archive: Archive, *, unsafe: bool) -> LoadedModel:
    path = archive.path
    if not unsafe:
        audit_program(archive)
    try:
        with path.open("rb") as file:  # torch warns of a name that does not end in .pt2
            program = torch.export.load(file)
        module = program.module(check_guards=False)  # guards are source text of the file
        plain = fx.GraphModule(module, module.graph)  # without the export's ban on train() and eval()
        users = set(program.graph_signature.user_inputs)
    except Exception as error:  # a damaged program can raise anything in torch
        raise LoadError(
            f"cannot load {path}: torch.export.load fails on it ({root_cause(error)[:200]})"
        ) from error
    for node in program.graph.nodes:
        if _runs_in_train_mode(node):
            raise LoadError(
                f"{path} was exported in train mode ({node.name}): call model.eval() before "
                "torch.export.export"
            )
    if program.example_inputs is None or program.example_inputs[1]:
        raise LoadError(f"{path} takes keyword arguments: export it with positional inputs only")
    if not program.example_inputs[0]:
        raise LoadError(f"{path} has no example inputs: export it again with torch.export.save")
    inputs = Inputs(tuple(program.example_inputs[0]))
    return LoadedModel(plain.eval(), inputs, _fixed_batch(program.graph, users))


def _runs_in_train_mode(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    position = _TRAINING_ARGUMENTS.get(str(node.target))
    if position is None:
        return False
    index, name = position
    return node.kwargs.get(name, node.args[index] if len(node.args) > index else None) is True


def _fixed_batch(graph: fx.Graph, users: set[str]) -> int | None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in users and isinstance(value, torch.Tensor):
            return value.shape[0] if value.dim() and isinstance(value.shape[0], int) else None
    return None
