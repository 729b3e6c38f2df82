"""A network or a module that became part of its graph: calls of its methods, and changes of its modules."""

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pn_compiler.base.diagnostics import Diagnostic
from pn_compiler.base.errors import TraceError
from pn_compiler.base.user_warnings import ConversionWarning
from pn_compiler.graph.graph_module import ConvertedModule
from pn_compiler.graph.own_class import PART, original_class, watched
from pn_compiler.inspection.hooks import HOOKS, has_hooks
from pn_compiler.nn import INPUT_AFFINE, ProxyNormAct
from pn_compiler.parts.followed_sites import NormalizedOnly
from pn_compiler.parts.following import follow, why
from pn_compiler.parts.installing import install, reopen
from pn_compiler.parts.originals import Original
from pn_compiler.parts.structure import Structure, changes, module_at, parts_of
from pn_compiler.running.inputs import Inputs


class Part:
    """What a converted module remembers of the one that it was made from.

    Args:
        original: of the graph that it is, or is part of.
        path: of the module in that graph; "" is the graph itself.
        added: paths in the graph of the modules that the conversion has made.
    """

    def __init__(self, original: Original, path: str = "", added: frozenset[str] = frozenset()) -> None:
        self.original, self.path, self.added = original, path, added
        self._graphs: dict[Any, tuple[ConvertedModule, list[nn.Module]]] = {}
        self._seen: list[tuple[nn.Module, tuple[Any, ...], tuple[dict[Any, Any], ...]]] | None = None
        self.network: weakref.ref[nn.Module] | None = None  # the graph
        self._deaf: frozenset[str] = frozenset()  # paths of parts whose hooks are not called

    def __deepcopy__(self, memo: dict[int, Any]) -> "Part":
        return Part(self.original, self.path, self.added)

    def __reduce__(self) -> tuple[Any, ...]:
        return Part, (self.original, self.path, self.added)

    # Changes -------------------------------------------------------------------------------------------

    def refresh(self, gm: ConvertedModule) -> None:
        """Makes the graph of `gm` fit its modules, some of which the user may have replaced or hooked."""
        original = self.original
        if self._seen is None:
            changed = bool(changes(gm, original.kinds, original.parts, self.added))
        else:
            changed = self._has_changed()
        if not changed and self._seen is None:
            self.look(gm)
        elif changed:
            self._seen, before = [], self._seen  # while it changes
            try:
                self._fit(gm)
            except Exception:
                self._seen = before  # to say so again
                raise
            self.look(gm)

    def look(self, gm: nn.Module) -> None:
        """Notes which modules the graph of `gm` fits: those that there are now."""
        for _, module in parts_of(gm):
            if PART in vars(module):
                vars(module)[PART].network = weakref.ref(gm)
        self._seen = [
            (
                module,
                (*module._modules.values(),),
                tuple(getattr(module, name) for name in HOOKS) if path else (),
            )
            for path, module in parts_of(gm)
        ]
        self._count = sum(map(len, (hooks for _, _, kinds in self._seen for hooks in kinds)))

    def _has_changed(self) -> bool:
        count = 0
        for module, children, hooks in self._seen or ():
            if (*module._modules.values(),) != children:
                return True
            for kind in hooks:
                count += len(kind)
        return count != self._count

    def _fit(self, gm: ConvertedModule) -> None:
        """Raises TraceError if the graph cannot be made to fit."""
        original = self.original
        changed = changes(gm, original.kinds, original.parts, self.added)
        added = reopen(gm, changed, original.kinds)
        if added is not None:
            self.added |= added
            return
        self._warn_of_hooks(gm)
        try:
            followed = follow(self.structure(gm), gm, "forward", original.inputs, whole=True)
        except Exception as error:
            what = ", ".join(sorted(changed)[:3])
            raise TraceError(
                f"PN215 {what} was replaced, removed or given hooks in the converted network, and its graph "
                f"cannot be made anew: {why(error)}; do it before the conversion"
            ) from error
        self.added = install(gm, followed, self.added)

    def _warn_of_hooks(self, gm: ConvertedModule) -> None:
        """Warns of hooks on parts that cannot be called on their own: the graph is as without them."""
        self._deaf = frozenset()
        for path, module in parts_of(gm):
            if not path or not has_hooks(module):
                continue
            try:
                own: Part = vars(module)[PART]
                follow(own.structure(module), module, "forward", None, feeding=own.feeding)
            except Exception as error:
                self._deaf |= {path}
                message = f"its hooks are not called, as nothing can call it on its own: {why(error)}"
                note = Diagnostic("PN218", path, message, "pn_compiler.features reads its outputs")
                warnings.warn(ConversionWarning(str(note), (note,)), stacklevel=2)

    @property
    def _base(self) -> str:
        return f"{self.path}." if self.path else ""

    def feeding(self, path: str) -> ProxyNormAct | None:
        """The site whose output the convolution at `path` in this module pads, in the network as it is."""
        network = None if self.network is None else self.network()
        at = self.original.feeds.get(self._base + path)
        site = None if network is None or at is None else module_at(network, at)
        return site if isinstance(site, ProxyNormAct) else None

    # Methods -------------------------------------------------------------------------------------------

    def structure(self, owner: nn.Module) -> Structure:
        """The structure of `owner` as it is now. Raises TraceError if it is unknown."""
        module = self.original.module
        if module is None:
            raise TraceError(
                "the structure of the original network is not known: it could not be copied or pickled"
            )
        base = self._base

        def inside(paths: Collection[str]) -> frozenset[str]:
            return frozenset(path.removeprefix(base) for path in paths if path.startswith(base))

        original = self.original
        kinds = {path: original.kinds[base + path] for path in inside(original.kinds)}
        return Structure(
            module.get_submodule(self.path),
            owner,
            kinds,
            parts=inside(original.parts),
            added=inside(self.added),
            entered=inside(original.entered),
            deaf=self._deaf,
            base=base,
        )

    def call(self, owner: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the method `name` of the original class of `owner`.

        Given tensors, it is traced and converted as the network was. Otherwise, or if that fails, its own
        code runs, and must not call what only computes the right thing inside the graph.
        """
        reason = ""
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
            try:
                graph = self.followed(owner, name, Inputs(args, kwargs))
            except Exception as error:  # of the tracer, or of the code that it runs on proxies
                reason = why(error)
            else:
                if any(isinstance(module, NormalizedOnly) for module in graph.modules()):
                    _refuse_in_code(f"{self.path or type(owner).__name__}, without the activation behind it,")
                return graph(*Inputs(args, kwargs).tensors())
        where = f"{self.path}.{name}" if self.path else name
        raw = inspect.getattr_static(original_class(type(owner)) or type(owner), name)
        with _watched_code(where, reason):
            return raw.__get__(owner)(*args, **kwargs)

    def followed(
        self, owner: nn.Module, name: str, inputs: Inputs | None, taps: Collection[str] = ()
    ) -> ConvertedModule:
        """The graph of a method of `owner`, made when it is first needed. Raises TraceError.

        Without `taps` it takes the tensors in the arguments only, one by one.
        """
        if isinstance(owner, ConvertedModule):
            self.refresh(owner)
        fed = (self.feeding(path.removeprefix(self._base)) for path in self.original.feeds)
        state = tuple(map(id, (*fed, *owner.modules(), *owner.parameters(), *owner.buffers())))
        key = name, None if inputs is None else _signature(inputs), tuple(taps), state
        if key not in self._graphs:
            on_meta = None if inputs is None else inputs.on_meta()
            gm = follow(
                self.structure(owner), owner, name, on_meta, taps=taps, fixed=not taps, feeding=self.feeding
            )
            shared = {id(module) for module in owner.modules()}
            stale = [other for other in self._graphs if other[-1] != state]
            for other in stale:
                del self._graphs[other]
            self._graphs[key] = gm, [module for module in gm.modules() if id(module) not in shared]
        graph, own = self._graphs[key]
        for module in own:
            module.training = owner.training
        return graph


def _signature(inputs: Inputs) -> tuple[Any, ...]:
    """What a trace depends on: kinds of tensors, values of everything else."""
    leaves, spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
    described = [
        (leaf.dim(), leaf.dtype, tuple(leaf.shape[1:2]))
        if isinstance(leaf, Tensor)
        else (type(leaf), repr(leaf))
        for leaf in leaves
    ]
    return (str(spec), *described)


def _refuse_bare_call(module: nn.Module, args: Any) -> None:
    """A forward pre-hook on all modules while the code of a method runs."""
    if watched and isinstance(module, (ProxyNormAct, *INPUT_AFFINE.values())):
        _refuse_in_code(f"a {type(module).__name__}")


def _refuse_in_code(what: str) -> None:
    """Raises TraceError if the code of a method is running, outside of a graph."""
    if watched and watched[-1] is not None:
        where, reason = watched[-1]
        because = f"; tracing the method fails: {reason}" if reason else ""
        raise TraceError(
            f"PN216 {where} calls {what} of the converted network, which computes the right thing only in "
            f"its graph: call forward or a method that can be traced, or use pn_compiler.features{because}"
        )


@contextlib.contextmanager
def _watched_code(where: str, reason: str) -> Iterator[None]:
    handle = torch.nn.modules.module.register_module_forward_pre_hook(_refuse_bare_call)
    watched.append((where, reason))
    try:
        yield
    finally:
        watched.pop()
        handle.remove()
