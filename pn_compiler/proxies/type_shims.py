"""Stand-ins for builtins in traced user code; they answer for the values behind proxies."""

from collections.abc import Callable
from typing import Any

import torch

from pn_compiler.inspection.containers import SWAPPED
from pn_compiler.proxies.proxies import PROXIES


def traced_isinstance(obj: Any, cls: Any) -> bool:
    """The builtin, answered for the value of a proxy."""
    cls = _without_shims(cls)
    if type(obj) not in PROXIES or isinstance(obj, cls):
        return isinstance(obj, cls)
    value = obj.sample("the forward asks for the type of")
    classes = cls if isinstance(cls, tuple) else (cls,)
    if isinstance(value, torch.Tensor) and any(type(c).__name__ == "tensortype" for c in classes):
        obj.refuse("PN114", f"the forward asks for the dtype of {obj!r} by its type")
    return isinstance(value, cls)


def traced_callable(obj: Any) -> bool:
    """The builtin, answered for the value of a proxy."""
    return callable(obj.sample("the forward asks whether it can call") if type(obj) in PROXIES else obj)


class _TracedType:
    """Stands in for the builtin ``type``: the type of a proxy is that of its value."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and type(args[0]) in PROXIES:
            return type(args[0].sample("the forward asks for the type of"))
        return type(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(type, name)

    def __eq__(self, other: object) -> bool:
        return other is self or other is type

    def __hash__(self) -> int:
        return hash(type)

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (type,)

    def __getitem__(self, item: Any) -> Any:
        return type[item]

    def __or__(self, other: Any) -> Any:
        return type | other

    def __ror__(self, other: Any) -> Any:
        return other | type


traced_type = _TracedType()


def _without_shims(cls: Any) -> Any:
    if cls is traced_type:
        return type
    return tuple(map(_without_shims, cls)) if type(cls) is tuple else cls


#: what user code gets for these names while it is traced
SHIMS: dict[str, Callable[..., Any]] = {
    "isinstance": traced_isinstance,
    "callable": traced_callable,
    "type": traced_type,
}
SWAPPED.update(map(id, SHIMS.values()))


def shims_for(names: dict[str, Any]) -> tuple[str, ...]:
    """Which of `SHIMS` code with these globals should get.

    Torch's functions use ``type(x)`` only to tell proxies and other subclasses from plain tensors.
    """
    return ("isinstance",) if str(names.get("__name__")).partition(".")[0] == "torch" else tuple(SHIMS)
