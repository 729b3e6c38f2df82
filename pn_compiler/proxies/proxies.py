"""Proxies that answer Python's questions for the value they stand for, never for the proxy itself."""

import dis
import operator
import sys
from dis import opname
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import proxy as fx_proxy

from pn_compiler.operators.in_place import InPlaceProxy
from pn_compiler.proxies.known_types import UNKNOWN, attribute_of, has_attribute, may_be_none

_OWN = frozenset(["tracer", "node", "param", "name", "root", "attr", "_node"])
_RANK_METHODS = ("dim", "ndimension")
_ASKS_CLASS = ("LOAD_ATTR", "LOAD_METHOD", "MATCH_CLASS")


class Untraceable(Exception):  # noqa: N818  # like fx.proxy.TraceError, it says what the code is
    """The module being traced does something that a graph would not do.

    Attributes:
        code: code of the diagnostic that reports it; None for what torch.fx itself cannot trace.
    """

    def __init__(self, code: str | None, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class TracedProxy(InPlaceProxy):
    """A proxy for a value whose type is known, or that refuses questions about it.

    Questions that Python asks of an object beyond its operators are answered for the value, so that the
    trace takes the branch of a real call; if the answer is unknown, the module is not traced.
    """

    tracer: Any

    def known(self) -> Any:
        """A value of the same type as this one, or UNKNOWN."""
        return self.tracer.known(self.node)

    def sample(self, question: str) -> Any:
        """A value of the same type as this one; the module is not traced if the type is unknown."""
        value = self.known()
        if value is UNKNOWN:
            raise self.refuse("PN114", f"{question} {self!r}, which is only known when the model runs")
        self.tracer.type_was_asked(self)
        return value

    def refuse(self, code: str | None, reason: str) -> Untraceable:
        error: Untraceable = self.tracer.refuse(code, reason)
        return error

    def __getattr__(self, k: str) -> Any:
        value = self.known()
        if value is UNKNOWN:
            if k.startswith("__"):
                raise AttributeError(k)
            if not hasattr(torch.Tensor, k):
                raise self.refuse(
                    "PN114", f"the forward asks for attribute {k!r} of {self!r}, whose type is unknown"
                )
        elif not has_attribute(value, k):
            self.tracer.type_was_asked(self)
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {k!r}")
        elif may_be_none(value, k):
            raise self.refuse("PN114", f"the forward asks for {self!r}.{k}, which may be None or not")
        rank = self.tracer.rank(self.node) if k == "ndim" else None
        return TracedAttribute(self, k) if rank is None else rank

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN:
            raise self.refuse(*self.tracer.write_of(self.node, f"sets {name!r} of"))
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise self.refuse(*self.tracer.write_of(self.node, f"deletes {name!r} of"))

    def __setitem__(self, index: Any, value: Any) -> None:
        """Records writes to tensors only: the caller's lists and dicts are not values of a graph."""
        if isinstance(self.known(), torch.Tensor):
            self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})
            return
        raise self.refuse(*self.tracer.write_of(self.node, "writes items of"))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of the value for Python code, and that of the proxy for torch's C code."""
        frame = sys._getframe(1)
        if opname[frame.f_code.co_code[frame.f_lasti]] in _ASKS_CLASS and not is_internal(frame.f_globals):
            return type(self.sample("the forward asks for the class of"))
        return type(self)

    def __eq__(self, other: object) -> Any:
        return self.tracer.create_proxy("call_function", operator.eq, (self, other), {})

    def __hash__(self) -> int:
        """The proxy's own hash, for torch.fx; refused in a forward, where lookups could hit other values."""
        if not is_internal(sys._getframe(1).f_globals):
            raise self.refuse("PN114", f"the forward looks {self!r} up in a dict, set or cache")
        return object.__hash__(self)

    def __len__(self) -> int:
        length: int | None = self.tracer.length(self.node)
        if length is None:
            raise self.refuse(None, f"the forward asks for the length of {self!r}")
        return length

    def __int__(self) -> int:
        raise self.refuse(None, f"the forward makes an int of {self!r}")

    def __float__(self) -> float:
        raise self.refuse(None, f"the forward makes a float of {self!r}")

    def __complex__(self) -> complex:
        raise self.refuse(None, f"the forward makes a complex of {self!r}")

    def __contains__(self, item: Any) -> bool:
        raise self.refuse(None, f"the forward asks whether something is in {self!r}")

    def __repr__(self) -> str:
        self._check_text(sys._getframe(1))
        return super().__repr__()

    def __str__(self) -> str:
        self._check_text(sys._getframe(1))
        return super().__repr__()

    def __format__(self, specification: str) -> str:
        self._check_text(sys._getframe(1))
        return format(super().__repr__(), specification)

    def _check_text(self, frame: FrameType) -> None:
        """Refuses to turn a value into text, because the proxy's text differs; messages are exempt."""
        if not is_library_module(frame.f_globals) and not _is_message(frame):
            raise self.refuse("PN114", "the forward makes text of a value")

    def __copy__(self) -> Any:
        raise self.refuse("PN114", f"the forward copies {self!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise self.refuse("PN114", f"the forward copies {self!r}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self.refuse("PN114", f"the forward pickles {self!r}")


class TracedAttribute(TracedProxy, fx_proxy.Attribute):
    """An attribute of a `TracedProxy`, recorded when it is read, or a method, recorded when it is called."""

    def known(self) -> Any:
        """The attribute of a value of the owner's type, or UNKNOWN."""
        return attribute_of(self.root.known(), self.attr)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method. Questions for a tensor's number of dimensions are answered if it is known."""
        rank = None
        if self.attr in _RANK_METHODS and not (args or kwargs):
            rank = self.tracer.rank(self.root.node)
        return super().__call__(*args, **kwargs) if rank is None else rank

    def __repr__(self) -> str:
        self._check_text(sys._getframe(1))
        return f"{self.root!r}.{self.attr}"

    __str__ = __repr__


class TensorProxy(TracedProxy, fx_proxy.ParameterProxy):
    """A parameter or buffer, whose shape is known and may be used in conditions."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, name: str, value: torch.Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)
        self.param = value  # type: ignore[assignment]
        self.name = name

    def size(self, dim: int | None = None) -> Any:
        return self.param.size() if dim is None else self.param.size(dim)

    def __len__(self) -> int:
        return len(self.param)


def _is_message(frame: FrameType) -> bool:
    """Whether the running statement keeps no value: a call for its effect, or a raise."""
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset > frame.f_lasti:
            if instruction.opname in ("POP_TOP", "RAISE_VARARGS"):
                return True
            if instruction.opname.startswith(_KEEPS):
                return False
    return False


_KEEPS = ("STORE_", "RETURN_", "YIELD_", "POP_JUMP_", "JUMP_")

PROXIES: frozenset[type] = frozenset([TracedProxy, TracedAttribute, TensorProxy])

# modules whose functions ask for types on behalf of their callers
_ASKS_FOR_CALLERS = frozenset(
    ["functools", "torch", "torch.functional", "torch.jit", "torch._jit_internal", "torch.nn.functional"]
)

# typing_extensions puts functions of its own into Python 3.10's typing
_LIBRARIES = frozenset(["torch", "pn_compiler", "numpy", "typing_extensions"])


def is_internal(names: dict[str, Any]) -> bool:
    """Whether these globals belong to a module of torch or Python, which recognises proxies."""
    name = str(names.get("__name__"))
    return not (name in _ASKS_FOR_CALLERS or name.startswith("torch.jit.")) and is_library_module(names)


def is_library_module(names: dict[str, Any]) -> bool:
    """Whether these globals belong to a module of torch, NumPy, Python or this package."""
    top = str(names.get("__name__")).partition(".")[0]
    return top in _LIBRARIES or (top in sys.stdlib_module_names and top != "__main__")


def module_proxy(tracer: fx.Tracer, name: str, value: torch.Tensor) -> fx.Proxy:
    """A proxy that reads the parameter or buffer `value` at path `name`."""

    def make(node: fx.Node) -> fx.Proxy:
        return TensorProxy(tracer, node, name, value)

    return tracer.create_proxy("get_attr", name, (), {}, proxy_factory_fn=make)


def is_parameter(module: nn.Module, path: str) -> bool:
    """Whether `path` names a parameter of `module`, under any of its names."""
    owner, _, name = path.rpartition(".")
    try:
        return name in module.get_submodule(owner)._parameters
    except AttributeError:
        return False
