"""The GraphModule that `transform` and `fold` return: one that remembers its sites."""

import copy
from typing import Any

from torch import fx, nn

from pn_compiler.base.diagnostics import Diagnostic, Site
from pn_compiler.base.errors import ConfigError
from pn_compiler.base.tables import SiteTable
from pn_compiler.inspection.hooks import HOOKS_AND_OPTIONS
from pn_compiler.inspection.model_checks import check_module

_SITES = "pn_compiler.sites"
_NOTES = "pn_compiler.notes"
_ATTRIBUTE = "_pn_compiler"


class ConvertedModule(fx.GraphModule):
    """A torch.fx.GraphModule that keeps its sites when pickled and its hooks when copied."""

    def adopt_hooks(self, module: nn.Module) -> "ConvertedModule":
        """Takes over the hooks of the module that this graph replaces; hooks added later are its own."""
        for hooks in HOOKS_AND_OPTIONS:
            setattr(self, hooks, copy.copy(getattr(module, hooks)))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "ConvertedModule":
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, ConvertedModule)
        for hooks in HOOKS_AND_OPTIONS:  # with the memo, so that the copy's hooks point to its own parts
            setattr(copied, hooks, copy.deepcopy(getattr(self, hooks), memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = super().__reduce__()
        kept = {key: self.meta[key] for key in (_SITES, _NOTES) if key in self.meta}
        hooks = {name: hooks for name in HOOKS_AND_OPTIONS if (hooks := getattr(self, name))}
        return _rebuild, (rebuild, arguments, kept, hooks)


def _rebuild(
    rebuild: Any, arguments: tuple[Any, ...], kept: dict[str, Any], hooks: dict[str, Any]
) -> ConvertedModule:
    plain: fx.GraphModule = rebuild(*arguments)
    converted = ConvertedModule(plain, plain.graph)
    converted.train(plain.training)
    for name, module in converted.named_modules(remove_duplicate=False):
        module.training = plain.get_submodule(name).training
    converted.meta.update(kept)
    for name, value in hooks.items():
        setattr(converted, name, value)
    return converted


def record(model: nn.Module, sites: tuple[Site, ...], notes: tuple[Diagnostic, ...]) -> None:
    """Marks `model` as the result of a conversion, with these `sites` and `notes`."""
    kept = {_SITES: sites, _NOTES: notes}
    if isinstance(model, fx.GraphModule):
        model.meta.update(kept)
    else:  # a model whose own forward cannot be traced keeps its class
        model.__dict__[_ATTRIBUTE] = kept


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
