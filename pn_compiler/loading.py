"""From a model file to a module, without running code that the file brings.

A pickle names functions and calls them, an exported program names operators and holds expressions: both
are read against lists of what is harmless. Everything else is refused by name.
"""

import collections
import dataclasses
import functools
import importlib
import inspect
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from pn_compiler.activations import activation_functions
from pn_compiler.errors import LoadError, first_line
from pn_compiler.inputs import Inputs
from pn_compiler.program_audit import audit_program

_LIBRARIES = ("torch.nn", "torchvision.models", "torchvision.ops", "timm.models", "timm.layers")
_HARMLESS: dict[str, object] = {
    "functools.partial": functools.partial,
    "builtins.slice": slice,
    "builtins.range": range,
    "collections.defaultdict": collections.defaultdict,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.int": int,
    "builtins.float": float,
    "builtins.bool": bool,
}
_SOURCE_TEXT = ("torch.fx.", "torch.jit.")  # modules whose pickles run source text
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a model file holds.

    Attributes:
        model: in the mode in which it was saved.
        inputs: what an exported program was made with, or None.
        fixed_batch: the batch size that an exported program was fixed to, or None.
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
        arch: ``package.module:factory`` that makes the module for a state_dict. It is imported.
        allow: ``package.module.Class`` names that a pickle may use, beside those of torch.nn,
            torchvision and timm. Their packages are imported.
        unsafe_pickle: let the file run any code, as ``torch.load(weights_only=False)`` does.

    Raises:
        LoadError: the file is missing, damaged, of another kind, or names what is not allowed.
    """
    names = _archive_names(path)
    if any(name.endswith("models/model.json") for name in names):
        return _load_program(path, names, unsafe=unsafe_pickle)
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        raise LoadError(
            f"{path} is TorchScript, which has no modules to convert: save the original nn.Module "
            "with torch.save, or a torch.export program of it"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise LoadError(f"{path} is a zip archive but not a model saved by torch.save or torch.export")
    loaded = _unpickle(path, allow, unsafe=unsafe_pickle)
    return LoadedModel(_as_module(path, loaded, arch))


def _archive_names(path: Path) -> list[str]:
    """The entries of the file, all of today's formats being zip archives."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if start.startswith(b"PK") and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return archive.namelist()
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged directory of the archive
        raise LoadError(f"{path} is damaged: {first_line(error)}") from error
    if not start:
        raise LoadError(f"{path} is empty")
    if start.startswith(b"PK"):
        raise LoadError(f"{path} is damaged: the zip archive is cut short")
    if start[:1] == b"\x80":
        raise LoadError(
            f"{path} is in the format of torch before 1.6 or a plain pickle, which cannot be checked: "
            "load it where you trust it and save it again with torch.save"
        )
    raise LoadError(f"{path} is not a model saved by torch.save or torch.export")


# Pickles -------------------------------------------------------------------------------------------


def _unpickle(path: Path, allow: Sequence[str], *, unsafe: bool) -> Any:
    try:
        if unsafe:
            import_from_here()
            return torch.load(path, map_location="cpu", weights_only=False)
        named = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        with torch.serialization.safe_globals(_admit_all(path, named, allow)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except LoadError:
        raise
    except Exception as error:  # whatever a damaged or hostile file provokes
        raise LoadError(f"cannot load {path}: {first_line(error)}") from error


def _admit_all(path: Path, names: list[str], allow: Sequence[str]) -> list[Any]:
    """(object, name) of each name that a pickle uses beside tensors and containers, if all are harmless."""
    found = {name: _admit(name, allow) for name in names}
    refused = [name for name, admitted in found.items() if admitted is None]
    if refused:
        raise LoadError(_refusal(path, refused))
    return [(admitted, name) for name, admitted in found.items()]


def _admit(name: str, allow: Sequence[str]) -> Any:
    """The object that a pickle names, if it is harmless or the user admits it; else None."""
    if name in _HARMLESS:
        return _HARMLESS[name]
    if name in allow and not name.startswith(_SOURCE_TEXT):
        import_from_here()
        return resolve(name)
    functions = {f"{f.__module__}.{f.__name__}": f for f in activation_functions()}
    if name in functions:
        return functions[name]
    if any(name.startswith(f"{library}.") for library in _LIBRARIES):
        found = resolve(name)
        if inspect.isclass(found) and issubclass(found, nn.Module) and not _runs_code(found):
            return found
    return None


def _refusal(path: Path, names: list[str]) -> str:
    """What to say about a pickle that uses `names`; nobody is led to admit what runs anything."""
    strange = [name for name in names if name.partition(".")[0] in sys.stdlib_module_names]
    if strange:
        return (
            f"{path} uses {', '.join(strange)}, which a model does not need and which can run any code: it "
            "was not loaded (--unsafe-pickle would run it)"
        )
    if any(name.startswith(_SOURCE_TEXT) for name in names):
        return (
            f"{path} is a pickled torch.fx or TorchScript module, which holds source text that loading runs: "
            "save its state_dict or the original module, or if you trust the file, --unsafe-pickle"
        )
    flags = " ".join(f"--allow {name}" for name in names)
    return (
        f"{path} uses {', '.join(names)}, not a module class of torch.nn, torchvision or timm: if you trust "
        f"the file, admit it with {flags}, or everything with --unsafe-pickle"
    )


def _runs_code(cls: type[nn.Module]) -> bool:
    """Whether unpickling a `cls` executes source text or native code that the file brings."""
    return issubclass(cls, fx.GraphModule | torch.jit.ScriptModule)


def resolve(name: str) -> Any:
    """The object with the dotted `name`, importing what holds it."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:split])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and module.startswith(error.name):
                continue
            raise LoadError(f"importing {module} failed: {error}") from error
        except Exception as error:
            raise LoadError(f"importing {module} failed: {first_line(error)}") from error
        try:
            return functools.reduce(getattr, parts[split:], found)
        except AttributeError:
            break
    raise LoadError(f"{name} cannot be imported: install the package that defines it")


def import_from_here() -> None:
    """Code that the user asked for may stand in the current folder, as with ``python -m``."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _as_module(path: Path, loaded: Any, arch: str | None) -> nn.Module:
    if isinstance(loaded, nn.Module):
        if arch is not None:
            raise LoadError(f"{path} holds a whole module: leave out --arch")
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
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise LoadError(f"{path} does not fit {arch}: {detail[:400]}") from error
    return model


def _state_dict(loaded: Any) -> dict[str, Any] | None:
    """The state_dict that `loaded` is or holds, with the prefixes of wrappers removed."""
    if not isinstance(loaded, dict):
        return None
    if not loaded or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        found = (loaded[key] for key in _STATE_DICT_KEYS if isinstance(loaded.get(key), dict))
        nested = next(found, None)
        return None if nested is None else _state_dict(nested)
    state: dict[str, Any] = dict(loaded)
    for prefix in _WRAPPER_PREFIXES:
        if all(key.startswith(prefix) for key in state):
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


def _load_program(path: Path, names: list[str], *, unsafe: bool) -> LoadedModel:
    try:
        if not unsafe:
            audit_program(path, names)
        program = torch.export.load(path)
        module = program.module(check_guards=False)  # guards are source text of the file
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"cannot load {path}: {first_line(error)}") from error
    for node in program.graph.nodes:
        if _runs_in_train_mode(node):
            raise LoadError(
                f"{path} was exported in train mode ({node.name}): call model.eval() before "
                "torch.export.export"
            )
    if program.example_inputs is None or program.example_inputs[1]:
        raise LoadError(f"{path} takes keyword arguments: export it with positional inputs only")
    inputs = Inputs(tuple(program.example_inputs[0]))
    plain = fx.GraphModule(module, module.graph)  # without the export's ban on train() and eval()
    return LoadedModel(plain.eval(), inputs, _fixed_batch(program))


def _runs_in_train_mode(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    name = str(node.target)
    return (name == "aten.dropout.default" and node.args[2] is True) or (
        name == "aten.batch_norm.default" and node.args[5] is True
    )


def _fixed_batch(program: torch.export.ExportedProgram) -> int | None:
    users = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in users and isinstance(value, torch.Tensor):
            return value.shape[0] if value.dim() and isinstance(value.shape[0], int) else None
    return None
