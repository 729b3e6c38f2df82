"""What a file of a converted network holds, and the network that is built from it."""

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pn_compiler.api import transform
from pn_compiler.base.errors import LoadError, PnCompilerError, first_line
from pn_compiler.base.user_warnings import ConversionWarning
from pn_compiler.graph.graph_module import ConvertedModule, notes, record, sites
from pn_compiler.graph.provenance import Provenance
from pn_compiler.inspection.captured import attributes, reachable
from pn_compiler.loading.rebuilding import MARK
from pn_compiler.running.inputs import Inputs
from pn_compiler.saving.edits import Edits, apply_edits, find_edits, own_tensors
from pn_compiler.saving.plain import (
    by_name,
    checked_size,
    inputs_from,
    is_plain,
    names_in,
    notes_from,
    plain_inputs,
    plain_notes,
    plain_sites,
    require,
    sites_from,
)

_FORMAT = 1
_KEYS = frozenset(
    ["options", "inputs", "structure", "shapes", "modules", "gone", "values", "tensors", "learning",
     "training", "sites", "notes", "version"]
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """A converted network as data.

    Attributes:
        origin: the architecture, on the meta device, and how it was converted.
        edits: what the user has changed since.
        tensors: name -> parameter or buffer.
        learning: names of the parameters that have gradients.
        training: paths of the modules in train mode.
        sites, notes: of the conversion; as plain data if they come from a file.
    """

    origin: Provenance
    edits: Edits
    tensors: Mapping[str, Tensor]
    learning: frozenset[str]
    training: frozenset[str]
    sites: Any
    notes: Any

    def to_plain(self) -> dict[str, Any]:
        """What is written: plain data, tensors, and modules without values."""
        structure = self.origin.structure
        assert structure is not None
        return {
            MARK: _FORMAT,
            "version": torch.__version__.split("+")[0],
            "options": dict(self.origin.options),
            "inputs": plain_inputs(self.origin.inputs),
            "structure": _emptied(structure),
            "shapes": {name: [*tensor.shape] for name, tensor in _all_tensors(structure).items()},
            "modules": self.edits.modules,
            "gone": self.edits.gone,
            "values": self.edits.values,
            "tensors": dict(self.tensors),
            "learning": sorted(self.learning),
            "training": sorted(self.training),
            "sites": plain_sites(self.sites),
            "notes": plain_notes(self.notes),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Contents":
        """Checks what a file holds. Raises LoadError if `to_plain` does not write such."""
        require(
            plain[MARK] == _FORMAT, f"a network in a later format, {str(plain[MARK])[:20]}, of pn_compiler"
        )
        require(plain.keys() == _KEYS | {MARK}, "other entries than pn_compiler.save writes")
        require(type(plain["version"]) is str, "a strange version")
        structure = plain["structure"]
        require(isinstance(structure, nn.Module), "no architecture")
        modules = by_name(plain["modules"], "changes")
        require(all(m is None or isinstance(m, nn.Module) for m in modules.values()), "strange changes")
        values = by_name(plain["values"], "values")
        edits = Edits(
            dict(modules),
            sorted(names_in(plain["gone"], "changes")),
            {path: dict(by_name(found, "values")) for path, found in values.items()},
        )
        tensors = by_name(plain["tensors"], "tensors")
        require(all(isinstance(tensor, Tensor) for tensor in tensors.values()), "strange tensors")
        options = by_name(plain["options"], "options")
        require(is_plain(dict(options)), "strange options")
        shapes = by_name(plain["shapes"], "shapes")
        return cls(
            Provenance(options, _on_meta(structure, shapes), inputs_from(plain["inputs"])),
            edits,
            tensors,
            names_in(plain["learning"], "names of parameters"),
            names_in(plain["training"], "paths of modules"),
            plain["sites"],
            plain["notes"],
        )


def contents_of(model: nn.Module, origin: Provenance) -> Contents:
    """`model`, which was converted as `origin` says, as data; values are shared with it."""
    edits = find_edits(converted_again(origin), model)
    tensors = _all_tensors(model)
    return Contents(
        origin,
        edits,
        {name: tensor.detach() for name, tensor in tensors.items()},
        frozenset(name for name, tensor in tensors.items() if tensor.requires_grad),
        frozenset(path for path, m in model.named_modules(remove_duplicate=False) if m.training),
        sites(model),
        notes(model),
    )


def built(contents: Contents) -> nn.Module:
    """The network that `contents` describe.

    Raises:
        LoadError: they do not fit each other.
    """
    model = converted_again(contents.origin)
    apply_edits(model, contents.edits)
    if isinstance(model, ConvertedModule):
        model.graph.lint()  # makes the graph fit the changes
    found = sites_from(contents.sites, sites(model))
    said = notes_from(contents.notes)
    _fill(model, contents)
    for path, module in model.named_modules(remove_duplicate=False):
        module.training = path in contents.training
    record(model, found, said)
    return model


def converted_again(origin: Provenance) -> nn.Module:
    """A conversion of the same architecture, on the meta device.

    Raises:
        LoadError: it cannot be converted, with these options.
    """
    structure, inputs = origin.structure, origin.inputs or Inputs()
    assert structure is not None
    options = {name: value for name, value in origin.options.items() if name != "leaves"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        try:
            return transform(
                structure, inputs.args or None, example_kwargs=inputs.kwargs or None,
                leaves=origin.options.get("leaves", ()), **options,
            )  # fmt: skip
        except PnCompilerError as error:
            raise LoadError(f"holds an architecture that cannot be converted: {error}") from error
        except Exception as error:  # the code of its classes may raise anything
            raise LoadError(f"holds an architecture that cannot be converted: {first_line(error)}") from error


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in own_tensors(module)
    }


def _emptied(structure: nn.Module) -> nn.Module:
    """A copy of `structure` whose parameters and buffers have no elements."""
    memo: dict[int, Any] = {}
    for tensor in _all_tensors(structure).values():
        empty = torch.empty(0, dtype=tensor.dtype)
        learns = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if learns else empty
    return copy.deepcopy(structure, memo)


def _on_meta(structure: nn.Module, shapes: Mapping[str, Any]) -> nn.Module:
    """`structure` with tensors of these shapes, which have no values."""
    require(shapes.keys() == _all_tensors(structure).keys(), "other tensors than its architecture has")

    def sized(name: str, tensor: Tensor) -> Tensor:
        empty = torch.empty(checked_size(shapes[name]), dtype=tensor.dtype, device="meta")
        learns = isinstance(tensor, nn.Parameter)
        return nn.Parameter(empty, tensor.requires_grad) if learns else empty

    _replace_tensors(structure, sized)
    return structure


def _fill(model: nn.Module, contents: Contents) -> None:
    """Puts the tensors of `contents` in the places of those of `model`, which have no values."""
    given = contents.tensors
    own = _all_tensors(model).keys()
    require(own == given.keys(), f"other tensors than its architecture has{_first(own ^ given.keys())}")

    def filled(name: str, tensor: Tensor) -> Tensor:
        value = given[name]
        same = value.shape == tensor.shape and _kind(value) == _kind(tensor)
        require(same, f"{name} of shape {[*value.shape]}, and its architecture has {[*tensor.shape]}")
        return nn.Parameter(value, name in contents.learning) if isinstance(tensor, nn.Parameter) else value

    _replace_tensors(model, filled)
    for path, module in model.named_modules():
        for value in reachable(attributes(module)):
            require(not (isinstance(value, Tensor) and value.is_meta), f"no values of a tensor in {path}")


def _first(names: Any) -> str:
    return f": {min(names)[:80]}" if names else ""


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _replace_tensors(model: nn.Module, new: Any) -> None:
    """Replaces each tensor by what `new` makes of it and its name, equal ones by equal ones."""
    made: dict[int, Tensor] = {}
    kept = []  # or another tensor could get its id
    for path, module in model.named_modules():
        for name, tensor in [*own_tensors(module)]:
            kept.append(tensor)
            if id(tensor) not in made:
                made[id(tensor)] = new(f"{path}.{name}" if path else name, tensor)
            if isinstance(module, nn.RNNBase):
                setattr(module, name, made[id(tensor)])  # which keeps a list of them
            else:
                registry = module._parameters if name in module._parameters else module._buffers
                registry[name] = made[id(tensor)]
