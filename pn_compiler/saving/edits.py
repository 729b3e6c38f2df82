"""What the user has changed in a converted network since its conversion, as data."""

import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from pn_compiler.base.errors import LoadError, UnsupportedModelError
from pn_compiler.graph.graph_module import ConvertedModule
from pn_compiler.graph.own_class import PART, original_class
from pn_compiler.inspection.captured import attributes
from pn_compiler.loading.pickle_audit import SAFE_NAME, is_behaviour
from pn_compiler.parts.structure import is_part, module_at
from pn_compiler.saving.plain import is_plain, require

_OF_TORCH = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph())))  # attributes of any graph or module
_CODE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)


@dataclasses.dataclass(slots=True)
class Edits:
    """Differences of a converted network from a fresh conversion of its architecture.

    Attributes:
        modules: path -> what was put there; None where a name was set to None.
        gone: paths of modules that were deleted.
        values: path of a module -> attributes with plain values that were set.
    """

    modules: dict[str, nn.Module | None] = dataclasses.field(default_factory=dict)
    gone: list[str] = dataclasses.field(default_factory=list)
    values: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def find_edits(fresh: nn.Module, model: nn.Module) -> Edits:
    """What makes of `fresh`, a new conversion, what `model` is.

    Raises:
        UnsupportedModelError: a converted module was moved.
    """
    edits = Edits()
    _compare(fresh, model, "", edits, _added(fresh) | _added(model))
    return edits


def _compare(fresh: nn.Module, model: nn.Module, path: str, edits: Edits, added: frozenset[str]) -> None:
    """Finds what differs below `path`, but for what the conversion itself has `added`."""
    values = {
        name: value
        for name, value in vars(model).items()
        if may_set(fresh, name) and is_plain(value) and not _same(vars(fresh).get(name, ...), value)
    }
    if values:
        edits.values[path] = values
    for name in dict.fromkeys((*fresh._modules, *model._modules)):
        inside = f"{path}.{name}" if path else name
        old, new = fresh._modules.get(name), model._modules.get(name)
        if inside in added or (old is None and new is None):
            continue
        if name not in model._modules:
            edits.gone.append(inside)
        elif old is not None and new is not None and _alike(old, new):
            _compare(old, new, inside, edits, added)
        else:
            _refuse_moved(new, inside)
            edits.modules[inside] = new


def _same(old: Any, new: Any) -> bool:
    return type(old) is type(new) and bool(old == new)


def _added(model: nn.Module) -> frozenset[str]:
    """Paths of the modules that a conversion has made."""
    graphs = ((path, vars(module).get(PART)) for path, module in model.named_modules())
    return frozenset(
        f"{path}.{name}" if path else name
        for path, part in graphs
        for name in (() if part is None or part.path else part.added)
    )


def _alike(old: nn.Module, new: nn.Module) -> bool:
    """Whether `new` is `old` but for values: of parameters, buffers and plain attributes, and children."""
    if isinstance(old, ConvertedModule) and isinstance(new, ConvertedModule):
        return original_class(type(old)) is original_class(type(new))
    if type(old) is not type(new) or is_part(old) != is_part(new):
        return False
    if is_part(old) and vars(old)[PART].path != vars(new)[PART].path:
        return False
    codes = [[value for value in attributes(module) if isinstance(value, _CODE)] for module in (old, new)]
    return shapes(old) == shapes(new) and codes[0] == codes[1]


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the own parameters and buffers of `module`, by name."""
    return {name: tuple(tensor.shape) for name, tensor in own_tensors(module)}


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _refuse_moved(module: nn.Module | None, path: str) -> None:
    for inside in () if module is None else module.modules():
        if isinstance(inside, ConvertedModule) or is_part(inside):
            raise UnsupportedModelError(f"a converted {type(inside).__name__} was moved to {path}")


def may_set(module: nn.Module, name: str) -> bool:
    """Whether `name` is that of an attribute of the user's, which torch does not read."""
    fine = name.isidentifier() and not name.startswith(("__", "_pn")) and name not in _OF_TORCH
    return fine and not is_behaviour(type(module), name)


# Applying ------------------------------------------------------------------------------------------


def apply_edits(model: nn.Module, edits: Edits) -> None:
    """Makes the changes in `model`, a fresh conversion. Raises LoadError if there is nothing to change."""
    for path, module in edits.modules.items():
        holder, name = _place(model, path)
        holder._modules[name] = module
    for path in edits.gone:
        holder, name = _place(model, path)
        require(name in holder._modules, f"a change of {path[:80]}, which its architecture does not have")
        del holder._modules[name]
    for path, values in edits.values.items():
        target = module_at(model, path)
        if target is None:
            raise LoadError(f"holds values of {path[:80]}, which its architecture does not have")
        for name, value in values.items():
            fine = may_set(target, name) and is_plain(value)
            require(fine, f"the attribute {str(name)[:60]!r} of a {type(target).__name__}")
            vars(target)[name] = value


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module in which the one at `path` is, and its name there."""
    parent, _, name = path.rpartition(".")
    holder = module_at(model, parent)
    fine = bool(SAFE_NAME.fullmatch(name)) and not name.startswith("__") and "." not in name
    if holder is None or not fine or is_behaviour(type(holder), name) or name in vars(holder):
        raise LoadError(f"holds a change of {path[:80]!r}, where its architecture can have no module")
    return holder, name


# Comparing -----------------------------------------------------------------------------------------


def difference(loaded: nn.Module, model: nn.Module) -> str:
    """In which way `loaded` is not like `model`, in words; empty if it is."""
    for what, found in _ASPECTS.items():
        one, other = found(loaded), found(model)
        for name in dict.fromkeys((*one, *other)):
            if one.get(name) != other.get(name):
                return f"{what} {name}".strip()
    return ""


def _modules(model: nn.Module) -> dict[str, Any]:
    return {
        path: original_class(type(module)) if isinstance(module, fx.GraphModule) else type(module)
        for path, module in model.named_modules(remove_duplicate=False)
    }


def _tensors(model: nn.Module) -> dict[str, Any]:
    """Shape of each tensor, the first name of it, and whether it learns."""
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in own_tensors(module):
            full = f"{path}.{name}" if path else name
            found[full] = (
                (*tensor.shape,),
                tensor.dtype,
                first.setdefault(id(tensor), full),
                tensor.requires_grad,
            )
    return found


def _graphs(model: nn.Module) -> dict[str, Any]:
    graphs = (pair for pair in model.named_modules() if isinstance(pair[1], ConvertedModule))
    return {path: _lines(gm) for path, gm in graphs}


def _lines(gm: ConvertedModule) -> list[tuple[Any, ...]]:
    """A graph without the names of its nodes, and of the modules that a conversion has added."""
    nodes = list(gm.graph.nodes)
    added = _added(gm)
    index = {node: f"%{number}" for number, node in enumerate(nodes)}
    lines = []
    for node in nodes:
        target: Any = node.target
        if node.op == "call_module" and target in added:
            target = type(gm.get_submodule(target))
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda node: index[node])
        lines.append((node.op, target if node.op != "output" else None, repr(arguments)))
    return lines


_ASPECTS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "the module": _modules,
    "the tensor": _tensors,
    "the graph": _graphs,
}
