"""Detects what a traced forward does that no graph repeats: random draws, clock reads, writes to old tensors.

Operators on proxies are recorded; everything else runs once, for real, and its result becomes a constant.
"""

import builtins
import dis
import functools
import gc
import random
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pn_compiler.inspection.module_state import storage_of
from pn_compiler.proxies.proxies import is_internal, is_library_module
from pn_compiler.proxies.type_shims import SHIMS, shims_for

Refuse = Callable[[str, str], Any]

_MATCHES_SHAPE = frozenset(["MATCH_SEQUENCE", "MATCH_MAPPING", "MATCH_KEYS"])
_CATCHES = frozenset(["CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH"])
_LOCALS = frozenset(["LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_DEREF"])
_DRAWS = frozenset(["random", "getrandbits", "randbytes", "seed", "setstate"])
_CLOCKS = {
    "time": ("time", "time_ns"),  # the others only measure
    "posix": ("urandom", "getrandom"),
    "nt": ("urandom",),
    "type": ("now", "utcnow", "today"),
}
_MODES = frozenset(["is_grad_enabled", "is_inference_mode_enabled"])
_ERRORS = frozenset(
    ["RuntimeError", "ValueError", "IndexError", "AssertionError", "Exception", "BaseException"]
)
_SUSPECTS = _DRAWS.union(*_CLOCKS.values(), _MODES)


class TensorWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses random draws, writes to tensors older than the trace, and operators on raw parameters.

    Raw parameters are those not read as attributes. A graph would hold all these results as constants.
    """

    def __init__(self, refuse: Refuse, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._refuse = refuse
        self._parameters = {storage_of(parameter) for parameter in model.parameters()}
        self._made: dict[int, torch.Tensor] = {}  # storage -> a tensor that keeps it alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded in func.tags and not _imports():
            self._refuse("PN117", f"the forward draws random numbers with torch ({name})")
        if func._schema.is_mutable:
            self._check_write(func, name, args, kwargs)
        result = func(*args, **kwargs)
        if not self._parameters.isdisjoint(map(storage_of, _tensors((args, kwargs)))):
            self._refuse("PN115", f"the forward computes with parameters behind torch.fx's back ({name})")
        before = set() if name == "lift_fresh" else {storage_of(t) for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if (storage := storage_of(tensor)) not in before:
                self._made[storage] = tensor
        return result

    def _check_write(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            if any(storage_of(tensor) not in self._made for tensor in _tensors(given)):
                self._refuse("PN115", f"the forward writes into a tensor that outlives it ({name})")


def _imports() -> bool:
    """Whether the running code is a module's import."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class PythonWatch:
    """Observes every Python function that is called during a trace.

    User code gets `SHIMS` instead of the builtins of these names, and must not draw random numbers, read
    clocks, or match on the shape of a value.
    """

    def __init__(self, refuse: Refuse, entered: Callable[[dict[str, Any]], None]) -> None:
        """`entered` is called with the globals of each user module whose code runs."""
        self._refuse, self._entered = refuse, entered
        self._internal: set[int] = set()  # identities of globals
        # globals, the names added to them, and their own builtins
        self._user: dict[int, tuple[dict[str, Any], list[str], dict[str, Any]]] = {}
        self._profiler: Any = None
        self._collects = False

    def __enter__(self) -> None:
        self._collects = gc.isenabled()
        gc.disable()  # callbacks of the collector are not the forward's code
        self._profiler = sys.getprofile()
        sys.setprofile(self._on_event)

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        _resume(self._profiler)
        if self._collects:
            gc.enable()
        for names, added, renamed in self._user.values():
            for name in added:
                names.pop(name, None)
            names.update(renamed)

    def _on_event(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            if id(frame.f_globals) not in self._internal and frame.f_code.co_name != "<module>":
                self._on_call(frame)
        elif event == "c_call" and arg.__name__ in _SUSPECTS:
            if arg.__name__ in _MODES and not is_internal(frame.f_globals):
                self._refuse("PN116", f"the forward asks for a mode of torch ({arg.__name__})")
            why = _unrepeatable(frame, arg)
            if why is not None and not _imports():
                self._refuse("PN117", why)

    def _on_call(self, frame: FrameType) -> None:
        names = frame.f_globals
        if id(names) not in self._user:
            if is_internal(names):
                self._internal.add(id(names))
                return
            if _imports():
                return
            shims = shims_for(names)
            added = [name for name in shims if name not in names]
            known = {id(getattr(builtins, name)): SHIMS[name] for name in shims}
            renamed = {name: value for name, value in names.items() if id(value) in known}
            self._user[id(names)] = names, added, renamed
            names.update((name, SHIMS[name]) for name in added)
            names.update((name, known[id(value)]) for name, value in renamed.items())
            if not is_library_module(names):
                self._entered(names)
        if (asks := _asks_unseen(frame.f_code)) is not None:
            self._refuse("PN114", f"the forward {asks}")


def _resume(profiler: Any) -> None:
    """Reinstalls the profiler that was active before."""
    if callable(profiler):
        sys.setprofile(profiler)
    elif hasattr(profiler, "enable"):  # cProfile
        profiler.enable()


@functools.lru_cache(maxsize=4096)
def _asks_unseen(code: CodeType) -> str | None:
    """What `code` asks of values that a proxy cannot notice, or None.

    Object identity is one: an operator may return its input, but it always returns a new proxy.
    """
    before, caught = "", ""
    for instruction in dis.get_instructions(code):
        if instruction.opname in _MATCHES_SHAPE:
            return "has a match statement over the shape of a value"
        if instruction.opname == "IS_OP" and before in _LOCALS:
            return "asks whether two variables are the same object"
        if instruction.opname in _CATCHES and caught in _ERRORS:
            return f"goes on after a {caught}, which a graph would raise"
        if instruction.opname.startswith("LOAD_"):
            caught = str(instruction.argval)
        before = instruction.opname
    return None


def _unrepeatable(frame: FrameType, function: Any) -> str | None:
    """Why a C function returns a different result in each call, or None."""
    owner = getattr(function, "__self__", None)
    name = function.__name__
    if isinstance(owner, random.Random) and name in _DRAWS:
        return f"the forward draws random numbers with Python's random ({name})"
    where = str(getattr(owner, "__name__", "")) if not isinstance(owner, type) else "type"
    if name not in _CLOCKS.get(where, ()):
        return None
    if where in ("posix", "nt"):
        return f"the forward draws random numbers from the system ({name})"
    return None if is_internal(frame.f_globals) else f"the forward reads a clock ({name})"
