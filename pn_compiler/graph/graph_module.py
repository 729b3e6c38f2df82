"""The GraphModule that `transform` and `fold` return: one that remembers its sites and where it came from."""

import copy
from typing import Any, Protocol

from torch import fx, nn

from pn_compiler.base.diagnostics import Diagnostic, Site
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.tables import SiteTable
from pn_compiler.graph.own_class import PART, is_importable, original_class, picklable, take_class, watched
from pn_compiler.graph.provenance import OPTIONS, Provenance
from pn_compiler.inspection.hooks import HOOKS_AND_OPTIONS
from pn_compiler.inspection.model_checks import check_module

_SITES = "pn_compiler.sites"
_NOTES = "pn_compiler.notes"
_PROVENANCE = "pn_compiler.provenance"
_ATTRIBUTE = "_pn_compiler"


class PartOfNetwork(Protocol):
    """What a graph needs of `pn_compiler.parts`."""

    def refresh(self, gm: "ConvertedModule") -> None:
        """Makes the graph of `gm` fit its modules, some of which the user may have replaced."""

    def look(self, gm: nn.Module) -> None:
        """Notes which modules the graph of `gm` fits: those that there are now."""

    def call(self, owner: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the method `name` that the original class of `owner` has."""


class ConvertedModule(fx.GraphModule):
    """A torch.fx.GraphModule that keeps its sites when pickled, its hooks and attributes when copied."""

    def adopt_hooks(self, module: nn.Module) -> "ConvertedModule":
        """Takes over the hooks of the module that this graph replaces; hooks added later are its own."""
        for hooks in HOOKS_AND_OPTIONS:
            setattr(self, hooks, copy.copy(getattr(module, hooks)))
        return self

    def _refresh_graph(self) -> bool:
        """Makes the graph fit modules that were replaced since it was made; does nothing if none were."""
        part: PartOfNetwork | None = self.__dict__.get(PART)
        if part is not None:
            part.refresh(self)
        return True

    _refresh_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile runs it as it is

    @property
    def graph(self) -> fx.Graph:
        self._refresh_graph()
        return self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        fx.GraphModule.graph.fset(self, graph)  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._refresh_graph()
        if not watched:
            return nn.Module.__call__(self, *args, **kwargs)  # not that of the original class
        watched.append(None)
        try:
            return nn.Module.__call__(self, *args, **kwargs)
        finally:
            watched.pop()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As of any module; the metadata also say how the network was converted."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        found = provenance(self)
        if found is not None and hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})[OPTIONS] = dict(found.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ConvertedModule":
        self._refresh_graph()
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, ConvertedModule)
        for hooks in HOOKS_AND_OPTIONS:  # with the memo, so that the copy's hooks point to its own parts
            setattr(copied, hooks, copy.deepcopy(getattr(self, hooks), memo))
        type(copied).__name__ = type(self).__name__
        # torch.fx copies what the graph calls, under one name
        copied._modules = {name: copy.deepcopy(child, memo) for name, child in self._modules.items()}
        for name in vars(self).keys() - vars(copied).keys():
            copied.__dict__[name] = copy.deepcopy(vars(self)[name], memo)
        return _looked_at(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        self._refresh_graph()
        rebuild, (body, imports) = super().__reduce__()
        kept = {key: self.meta[key] for key in (_SITES, _NOTES, _PROVENANCE) if key in self.meta}
        hooks = {name: hooks for name in HOOKS_AND_OPTIONS if (hooks := getattr(self, name))}
        original = original_class(type(self))
        kind = original if original is not None and is_importable(original) else None
        return _rebuild, (rebuild, (picklable(self, body), imports), kept, hooks, kind)


def _rebuild(
    rebuild: Any,
    arguments: tuple[Any, ...],
    kept: dict[str, Any],
    hooks: dict[str, Any],
    kind: type[nn.Module] | None = None,
) -> ConvertedModule:
    plain: fx.GraphModule = rebuild(*arguments)
    converted = ConvertedModule(plain, plain.graph, type(plain).__name__)
    converted.training = plain.training
    converted._modules = dict(plain._modules)
    for name in vars(plain).keys() - vars(converted).keys():
        converted.__dict__[name] = vars(plain)[name]
    converted.meta.update(kept)
    for name, value in hooks.items():
        setattr(converted, name, value)
    if kind is not None:
        take_class(converted, ConvertedModule, kind)
    return _looked_at(converted)


def freeze_graph(gm: ConvertedModule) -> None:
    """Makes the graph of `gm` stay as it is, whatever becomes of its modules, so that it can be edited."""
    gm._refresh_graph()
    vars(gm).pop(PART, None)


def detach(gm: ConvertedModule) -> ConvertedModule:
    """Makes `gm` forget what it was made from, so that its graph and modules can be edited as they are."""
    freeze_graph(gm)
    for module in gm.modules():
        vars(module).pop(PART, None)
    return gm


def _looked_at(converted: ConvertedModule) -> ConvertedModule:
    part: PartOfNetwork | None = vars(converted).get(PART)
    if part is not None:
        part.look(converted)
    return converted


def record(model: nn.Module, sites: tuple[Site, ...], notes: tuple[Diagnostic, ...]) -> None:
    """Marks `model` as the result of a conversion, with these `sites` and `notes`."""
    _keep(model, {_SITES: sites, _NOTES: notes})


def remember(model: nn.Module, found: Provenance | None) -> None:
    """Keeps in `model` how it was converted; None makes it forget that."""
    _keep(model, {_PROVENANCE: found})


def provenance(model: nn.Module) -> Provenance | None:
    """How `model` was converted, if that can be repeated: a folded network is made of another graph."""
    return _meta(model).get(_PROVENANCE)


def _keep(model: nn.Module, kept: dict[str, Any]) -> None:
    if isinstance(model, fx.GraphModule):
        model.meta.update(kept)
    else:  # a model whose own forward cannot be traced keeps its class
        model.__dict__[_ATTRIBUTE] = model.__dict__.get(_ATTRIBUTE, {}) | kept


def _meta(model: nn.Module) -> dict[str, Any]:
    check_module(model)
    meta: dict[str, Any] = getattr(model, "meta", {}) if isinstance(model, fx.GraphModule) else {}
    return meta or model.__dict__.get(_ATTRIBUTE, {})


def is_converted(model: nn.Module) -> bool:
    """Whether `model` is a result of `transform`, or of `fold` after it."""
    return _SITES in _meta(model)


def sites(model: nn.Module) -> SiteTable:
    """What became of each BatchNorm of the model that was given to `transform`; ``print`` shows a table.

    Args:
        model: a result of `transform` or `fold`, or a copy of one.

    Raises:
        ConfigError: `model` is not one.
    """
    if not is_converted(model):
        raise ConfigError(f"{type(model).__name__} is not a result of pn_compiler.transform")
    return SiteTable(_meta(model)[_SITES])


def notes(model: nn.Module) -> tuple[Diagnostic, ...]:
    """The diagnostics of the conversion that made `model`; see `sites`."""
    sites(model)
    result: tuple[Diagnostic, ...] = _meta(model)[_NOTES]
    return result
