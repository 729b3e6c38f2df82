"""What a pickle may name: module classes, activation functions and plain types. Nothing is called."""

import contextlib
import dataclasses
import enum
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from _compat_pickle import IMPORT_MAPPING  # modules of Python 2
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from pn_compiler.base.errors import ConfigError, LoadError, first_line
from pn_compiler.base.option_checks import did_you_mean
from pn_compiler.loading.inert_types import inert_type
from pn_compiler.operators.activations import activation_functions

_LIBRARIES = ("torch.nn", "torchvision.models", "torchvision.ops", "timm.models", "timm.layers")
_DOTTED = re.compile(r"(?!_*__)[A-Za-z_]\w*(\.(?!__)[A-Za-z_]\w*)+", re.ASCII)
_CLASS = re.compile(r"_*[A-Z]\w*")  # how classes of modules are named
_PLAIN: dict[str, object] = {
    f"builtins.{kind.__name__}": kind for kind in (dict, list, tuple, set, int, float, bool, str)
}
_DETECTION = "torchvision.models.detection._utils"
_AVERAGED = "torch.optim.swa_utils.AveragedModel"
_HELPERS = (  # of detectors; plain values and arithmetic
    *(f"{_DETECTION}.{n}" for n in ("BoxCoder", "BoxLinearCoder", "Matcher", "SSDMatcher")),
    f"{_DETECTION}.BalancedPositiveNegativeSampler",
    "torchvision.ops.boxes.box_iou",
)
_NO_MODELS = {*sys.stdlib_module_names, *(n.partition(".")[0] for n in IMPORT_MAPPING)} | {
    "torch", "torchvision", "timm", "numpy", "functorch", "pn_compiler",
}  # fmt: skip  # top-level packages none of whose names is suggested to --allow


def admit(name: str, allow: Sequence[str]) -> Any:
    """The object that a pickle names, if it is harmless or the user admits it; else None.

    Raises:
        LoadError: it cannot be imported, or the user admits something that no model needs.
    """
    if name in _PLAIN:
        return _PLAIN[name]
    if (inert := inert_type(name)) is not None:
        return inert
    if not _DOTTED.fullmatch(name):
        return None
    if name in allow:
        return _admit_on_request(name)
    functions = {f"{f.__module__}.{f.__name__}": f for f in activation_functions()}
    if name in functions:
        return functions[name]
    if name in _HELPERS or name == _AVERAGED:
        return resolve(name)
    if _within(name, _LIBRARIES):
        admitted = resolve(name)
        plain = inspect.isclass(admitted) and issubclass(admitted, nn.Module | enum.Enum)
        if plain and _within(admitted.__module__, _LIBRARIES) and not _runs_code(admitted):
            return admitted
    return None


def _within(name: str, packages: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def is_module_class(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)


def _admit_on_request(name: str) -> Any:
    """The class that a user admits by ``--allow``. Raises LoadError for what no pickled module needs."""
    import_from_here()
    cls = resolve(name)
    if not inspect.isclass(cls):
        raise LoadError(f"--allow {name}: it is a {type(cls).__name__}, and only classes can be admitted")
    if _runs_code(cls):
        raise LoadError(f"--allow {name}: unpickling it runs source text; --unsafe-pickle lets files do that")
    if is_module_class(cls):
        return cls
    package = cls.__module__.partition(".")[0]
    inert = dataclasses.is_dataclass(cls) or issubclass(cls, enum.Enum) or hasattr(cls, "_fields")
    if package in _NO_MODELS or not inert:
        raise LoadError(
            f"--allow {name}: it is neither an nn.Module, nor a dataclass, Enum or named tuple of yours, and "
            "might run code when it is unpickled"
        )
    return cls


def admit_nested(nested: Mapping[str, str], admitted: Mapping[str, Any]) -> dict[str, Any]:
    """What a pickle calls to reach admitted classes inside classes: a getattr that knows nothing else.

    Args:
        nested: path of a class -> that of the class that holds it.
        admitted: path -> admitted object.
    """
    if not nested:
        return {}
    outer_classes = {outer: resolve(outer) for outer in nested.values()}

    def nested_class(outer: Any, name: str) -> Any:
        for path, holder in nested.items():
            if outer_classes[holder] is outer and path == f"{holder}.{name}":
                return admitted[path] if path in admitted else outer_classes[path]
        raise LoadError(f"{name} of {outer!r:.80} was not admitted")

    return {"builtins.getattr": nested_class} | outer_classes


def _runs_code(cls: type) -> bool:
    """Whether unpickling a `cls` executes source text or native code from the file."""
    return issubclass(cls, fx.GraphModule | torch.jit.ScriptModule)


def refusal(names: Sequence[str]) -> str:
    """The message about a pickle that uses `names`; it never suggests admitting what can run code."""
    listed = ", ".join(name[:80] for name in names[:5]) + (", ..." if len(names) > 5 else "")
    if any(_within(name, ("pn_compiler",)) for name in names):
        return (
            f"uses {listed}: it is a converted network pickled with the source text of its graph, which "
            "loading would run: write it with pn_compiler.save(model, path), which this command reads, or if "
            "you trust the file, --unsafe-pickle"
        )
    if any(_within(name, ("torch.fx", "torch.jit")) for name in names):
        return (
            f"uses {listed}: a pickled torch.fx or TorchScript module holds source text that loading runs: "
            "save its state_dict or the original module, or if you trust the file, --unsafe-pickle"
        )
    if all(name.startswith("__main__.") for name in names):
        return (
            f"uses {listed}, defined in the script that saved it, where nobody else finds it: save the "
            "state_dict and name its network with --arch, or move the class into a module"
        )
    if not all(_may_be_a_module(name) for name in names):
        return (
            f"uses {listed}, which a model does not need and which can run any code: it was not loaded "
            "(--unsafe-pickle would run it)"
        )
    flags = " ".join(f"--allow {name}" for name in names)
    return (
        f"uses {listed}, not a module class of torch.nn, torchvision or timm: if you trust the file, admit "
        f"it with {flags}, or everything with --unsafe-pickle"
    )


def _may_be_a_module(name: str) -> bool:
    """Whether `name` looks like a class from a user's own package."""
    package, _, rest = name.partition(".")
    return (
        bool(_DOTTED.fullmatch(name))
        and package not in _NO_MODELS
        and bool(_CLASS.fullmatch(rest.rpartition(".")[2]))
    )


def resolve(name: str) -> Any:
    """Imports and returns the object with the dotted `name`."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:split])
        try:
            holder: Any = _import(module)
        except ModuleNotFoundError as error:
            if error.name is not None and module.startswith(error.name):
                continue
            raise LoadError(f"importing {module} failed: {error}") from error
        except Exception as error:
            raise LoadError(f"importing {module} failed: {first_line(error)}") from error
        try:
            return functools.reduce(getattr, parts[split:], holder)
        except AttributeError:
            raise LoadError(f"{name} cannot be imported: {_absent(holder, parts[split:])}") from None
    raise LoadError(f"{name} cannot be imported: install the package that defines it")


def _absent(holder: Any, parts: Sequence[str]) -> str:
    """What is not there, of `parts`: the first of `holder`, each other one of the one before it."""
    for part in parts:
        if not hasattr(holder, part):
            break
        holder = getattr(holder, part)
    name = getattr(holder, "__name__", type(holder).__name__)
    return f"{name} has no {part}{did_you_mean(part, dir(holder))}"


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    declare_torchvision_operators()
    return importlib.import_module(module)


def prepare_torchvision() -> None:
    """Imports torchvision, if it is installed, so that code of the user's can import it, too."""
    if importlib.util.find_spec("torchvision") is not None:
        with contextlib.suppress(ImportError, RuntimeError, AttributeError):  # whoever needs it will see why
            _import("torchvision")


def declare_torchvision_operators() -> None:
    """Makes torchvision importable if its compiled operators do not match torch, such as a CPU build.

    Classifiers need none of them. Calling one without an implementation raises an error in torch.
    """
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)


def named_function(name: str, what: str) -> Callable[..., Any]:
    """Imports the function ``package.module:function``.

    Args:
        name: the user's, whose code runs.
        what: it is, for the message.

    Raises:
        ConfigError: there is none of that name.
    """
    import_from_here()
    try:
        function = resolve(name.replace(":", "."))
    except LoadError as error:
        raise ConfigError(f"{name}: {error}") from error
    if not callable(function):
        raise ConfigError(f"{name} is a {type(function).__name__}, not {what}")
    found: Callable[..., Any] = function
    return found


def import_from_here() -> None:
    """Lets code that the user asked for be in the current folder, as with ``python -m``."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
